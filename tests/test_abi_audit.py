"""The native module needs nothing of torch but the stable ABI of 2.10, and the audit that says so sees strangers."""

import shutil
import subprocess
import sys
from pathlib import Path

import abi_audit
import pytest

from alum_kernels.backends import native

MODULE, REASON = native.load()
needs_tools = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("g++")), reason="reading and making libraries needs nm and g++"
)


@pytest.fixture(scope="module")
def runtime() -> set[str]:
    return abi_audit.runtime_exports()


@needs_tools
@pytest.mark.skipif(MODULE is None, reason=f"native module: {REASON}")
def test_the_module_needs_the_stable_abi_alone(runtime):
    undefined = abi_audit.undefined_symbols(Path(MODULE.__file__))
    found = abi_audit.audit(undefined, abi_audit.stable_torch(), runtime)
    assert not found.outside, abi_audit.report(Path(MODULE.__file__), found)
    assert MODULE.build_info()["torch_target"] == ".".join(map(str, abi_audit.TARGET))
    # what it surely uses is there: an audit of nothing would pass as well
    assert {"torch_parallel_for", "torch_library_impl", "torch_call_dispatcher"} <= found.torch
    assert "PyModuleDef_Init" in found.cpython
    assert found.runtimes["GLIBC"] >= (2, 2, 5)
    assert found.runtimes["GLIBCXX"] >= (3, 4)


@needs_tools
def test_planted_symbols_are_found(tmp_path, runtime):
    """A C++ function of torch, one in a template of std, one that torch has since 2.12, and a stranger."""
    (tmp_path / "planted.cpp").write_text(
        "#include <vector>\n"
        "namespace at { struct Tensor; Tensor& planted(Tensor&); }\n"
        "namespace c10 { extern int planted; }\n"
        "extern template class std::vector<at::Tensor*>;\n"
        'extern "C" int aoti_torch_dtype_float8_e8m0fnu(); extern "C" int aoti_torch_dtype_float32();\n'
        'extern "C" int stranger();\n'
        'extern "C" int use(at::Tensor& x, std::vector<at::Tensor*>& v) {\n'
        "  at::planted(x); v.reserve(9);\n"
        "  return aoti_torch_dtype_float8_e8m0fnu() + aoti_torch_dtype_float32() + stranger() + c10::planted;\n}\n"
    )
    library = tmp_path / "planted.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, tmp_path / "planted.cpp"], check=True)
    found = abi_audit.audit(abi_audit.undefined_symbols(library), abi_audit.stable_torch(), runtime)
    assert found.torch == {"aoti_torch_dtype_float32"}
    names = {"_ZN2at7plantedERNS_6TensorE", "_ZN3c107plantedE", "aoti_torch_dtype_float8_e8m0fnu", "stranger"}
    assert names <= found.outside
    assert [name for name in found.outside - names if name.startswith("_ZNSt6vectorIPN2at6Tensor")]
    ran = subprocess.run(
        [sys.executable, Path(abi_audit.__file__), library], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "outside the stable ABI: stranger" in ran.stdout


def test_guards_of_later_versions_hide_what_they_enclose():
    header = """
    AOTI_TORCH_EXPORT int32_t always();
    // AOTI_TORCH_EXPORT int32_t in_a_comment();
    /* AOTI_TORCH_EXPORT int32_t in_another(); */
    #ifdef USE_CUDA
    AOTI_TORCH_EXPORT AOTITorchError
    with_cuda(void (*fn)(int), int32_t);
    #else
    AOTI_TORCH_EXPORT int32_t without_cuda();
    #endif  // USE_CUDA
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
    AOTI_TORCH_EXPORT int32_t since_2_10();
    #ifdef USE_CUDA
    AOTI_TORCH_EXPORT int32_t since_2_10_with_cuda();
    #endif
    #endif // TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0
    AOTI_TORCH_EXPORT const char* since_2_11();
    #ifdef USE_CUDA
    AOTI_TORCH_EXPORT int32_t since_2_11_with_cuda();
    #endif
    #endif
    """
    old = {"always", "with_cuda", "without_cuda", "since_2_10", "since_2_10_with_cuda"}
    assert abi_audit.stable_functions(header, (2, 10)) == old
    assert abi_audit.stable_functions(header, (2, 11)) == old | {"since_2_11", "since_2_11_with_cuda"}
    assert abi_audit.stable_functions(header, (2, 9)) == {"always", "with_cuda", "without_cuda"}


@pytest.mark.parametrize(
    "header",
    [
        "#if TORCH_FEATURE_VERSION < TORCH_VERSION_2_12_0\n#endif",
        "#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0\n#else\n#endif",
    ],
)
def test_guards_of_another_form_are_refused(header):
    with pytest.raises(ValueError, match="header: expected"):
        abi_audit.stable_functions(header)


def test_the_highest_version_is_reported():
    symbols = ["a@GLIBC_2.2.5", "b@GLIBC_2.14", "c@@GLIBC_2.4", "d@GLIBCXX_3.4.29", "PyList_New", "_Py_NoneStruct", "e"]
    found = abi_audit.audit([*symbols, "__gmon_start__"], {"e"}, set())
    assert found.runtimes == {"GLIBC": (2, 14), "GLIBCXX": (3, 4, 29)}
    assert (found.torch, found.cpython, found.outside) == ({"e"}, {"PyList_New", "_Py_NoneStruct"}, set())
    text = abi_audit.report(Path("x.so"), found)
    assert text == "x.so: 1 functions of torch's stable ABI 2.10, 2 of CPython; at least GLIBC 2.14, GLIBCXX 3.4.29"
