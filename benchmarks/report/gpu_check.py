"""The stages of the check on a CUDA machine."""

from .files import ResultFile
from .markup import Finding, Html, joined, table, tag, toned

TITLE = "GPU check"
INTRO = "Build, tests, sanitizers and benchmarks on a CUDA machine, each passed, failed or not run."
TONES = {"passed": "win", "failed": "loss"}


def findings(file: ResultFile) -> list[Finding]:
    found = []
    for outcome in dict.fromkeys(stage["outcome"] for stage in file.content["stages"]):
        names = [stage["name"] for stage in file.content["stages"] if stage["outcome"] == outcome]
        found.append(Finding(f"{len(names)} {outcome}: {', '.join(names)}", TONES.get(outcome, "plain")))
    return found


def body(file: ResultFile) -> Html:
    stages = file.content["stages"]
    lines = [
        (stage["name"], toned(stage["outcome"], TONES.get(stage["outcome"], "plain")), f"{stage['seconds']:.1f}")
        for stage in stages
    ]
    said = [
        tag("details", tag("summary", f"{stage['name']}: last lines"), tag("pre", stage["detail"]))
        for stage in stages
        if stage["detail"]
    ]
    return joined((table(("stage", "outcome", "seconds"), lines, text_columns=2), *said))


def compared(file: ResultFile) -> dict[str, str]:
    return {stage["name"]: f"{stage['outcome']}, {stage['seconds']:.1f} s" for stage in file.content["stages"]}
