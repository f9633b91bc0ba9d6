"""The published methods as settings of :class:`alum_kernels.adversarial.config.AdversarialConfig`.

Notation: e clean embeddings, delta the perturbation, L the task's loss, f the prediction, g a gradient with respect to
the perturbed embeddings, sKL the symmetric KL divergence, Pi the projection into the ball of radius epsilon; other
names are the config's fields, with the papers' letters in brackets.
"""

from typing import Any, Self

from alum_kernels.adversarial.freelb_constants import FREELB_GLUE, FreeLBSetting, freelb_ball
from alum_kernels.ops.checks import check_choice

__all__ = ["FREELB_GLUE", "PRESETS", "FreeLBSetting", "Presets"]


PRESETS = (
    "alum_pretraining",
    "alum_continual",
    "alum_finetuning",
    "smart",
    "mtdnn",
    "freelb",
    "pgd",
    "fgm",
    "freeat",
    "yopo",
    "llr",
    "vat",
    "sift",
    "r3f",
    "rdrop",
    "neftune",
)
"""Names of the classmethods of :class:`Presets`."""

_SUPERVISED = {"alpha": 0.0, "clean_weight": 0.0, "adversarial_weight": 1.0, "ascent": "task"}


class Presets:
    """Constructors of a config with published constants; keyword arguments change single fields."""

    @classmethod
    def alum_pretraining(cls, **changes: Any) -> Self:
        """ALUM for pre-training: alpha 10, std = epsilon = 1e-5, step_size (eta) 1e-3, K = 1, raw gradient, clip.

            loss = L(e) + alpha sKL(f(e + delta), f(e)),  delta = Pi(delta_0 + step_size g),  delta_0 ~ N(0, std^2)

        The paper's curriculum runs the standard objective first: ``start=0.5`` for its second half.

        With these published constants the ascent barely moves delta: the gradient of the divergence at 1e-5 is so small
        that eta times it is about 1e-6 of delta's own length on a pretrained six-layer model, and the clip halves the
        divergence. The telemetry's ascent gain shows it. ``normalize="linf"`` or ``"sign"`` climbs.

        Source: Liu et al., arXiv:2004.08994, Algorithm 1 and section 4.1.
        """
        return cls._preset("alum_pretraining", changes, alpha=10.0)

    @classmethod
    def alum_continual(cls, **changes: Any) -> Self:
        """ALUM for continual pre-training from a trained model: :meth:`alum_pretraining`, from the first step on.

        Source: Liu et al., arXiv:2004.08994, section 4.1 (100,000 steps from RoBERTa).
        """
        return cls._preset("alum_continual", changes, alpha=10.0)

    @classmethod
    def alum_finetuning(cls, **changes: Any) -> Self:
        """ALUM for fine-tuning: as :meth:`alum_pretraining` with alpha 1, and as barely moving.

        Source: Liu et al., arXiv:2004.08994, Algorithm 1 and section 4.1.
        """
        return cls._preset("alum_finetuning", changes, alpha=1.0)

    @classmethod
    def smart(cls, *, norm: str = "linf", **changes: Any) -> Self:
        """SMART: smoothness-inducing regulariser, and Bregman proximal point updates where ``proximal`` is mu > 0.

            loss = L(e) + alpha sKL(f(e + delta), f(e)) + proximal sKL(f(e), f(e; teacher))
            delta = Pi(delta_0 + step_size g / ||g||)         per sequence, in the ball of p = inf ("linf") or 2 ("l2")
            teacher <- beta teacher + (1 - beta) model            every S optimizer steps; beta = 0: the model as it was

        epsilon = std (sigma) = 1e-5, step_size (eta) 1e-3, alpha (lambda) 1 (of 1, 3, 5). The paper's proximal setting
        is ``proximal=1.0, proximal_momentum=((0.1, 0.99), (0.1, 0.999))``: beta 0.99 in the first tenth, then 0.999.
        Regression heads use
        the squared error. In the l2 ball the gradient is divided by its Euclidean norm.

        Source: Jiang et al., arXiv:1911.03437, Algorithm 1 and section 4.1.
        """
        check_choice("norm", norm, ("linf", "l2"))
        return cls._preset("smart", changes, norm=norm, normalize=norm, level="sequence")

    @classmethod
    def mtdnn(cls, **changes: Any) -> Self:
        """The algorithm of the official ALUM and SMART code, for people who reproduce it.

            delta = (delta_0 + step_size g) / (max|delta_0 + step_size g| + 1e-6)   per token, or level="sequence"

        The raw gradient step is followed by a rescaling of delta to an infinity norm near 1 (not by a clip to 1e-5),
        the ascent climbs KL(f(e) || f(e + delta)), training detaches the targets and dropout is independent in every
        pass. The code climbs a surrogate of that KL whose gradient is up to four times as long and, beyond two classes,
        points a little elsewhere: after the rescaling the direction is nearly the same. It leaves padding unmasked.

        Source: the SmartPerturbation class of https://github.com/namisan/mt-dnn (mt_dnn/perturbation.py, 676b48b).
        """
        return cls._preset(
            "mtdnn",
            changes,
            norm="linf_rescale",
            ascent_divergence="kl",
            gradient="detach_targets",
            dropout="independent",
        )

    @classmethod
    def freelb(cls, task: str = "rte", **changes: Any) -> Self:
        """FreeLB: the task's loss along the ascent, every pass of which trains with 1/(K + 1) of the gradient.

            delta_0 = std U(-1, 1) / sqrt(n), n valid elements; delta <- Pi(delta + step_size g / ||g||), per sequence
            loss = 1/(K + 1) sum over t = 0 .. K of L(e + delta_t)

        The ascent is free: one backward gives the gradients of the parameters and of delta. Dropout masks are shared by
        the passes, on any model. Needs :meth:`AdversarialObjective.backward`.

        Args:
            task: GLUE task whose constants are taken, of ``FREELB_GLUE``.

        Source: Zhu et al., arXiv:1909.11764, Algorithm 1; constants: ``FREELB_GLUE``.
        """
        return cls._preset("freelb", changes, **_SUPERVISED, **freelb_ball(task), backward="accumulate")

    @classmethod
    def pgd(cls, task: str = "rte", **changes: Any) -> Self:
        """Projected gradient descent: trains on the task's loss at the end of a K-step ascent.

            loss = L(e + delta_K),  delta as in :meth:`freelb`

        Args:
            task: GLUE task whose constants are taken, of ``FREELB_GLUE``.

        Source: Madry et al., arXiv:1706.06083, as compared by Zhu et al., arXiv:1909.11764; constants:
        ``FREELB_GLUE``, whose launch scripts for PGD have the same ones but for CoLA, MNLI and QNLI.
        """
        return cls._preset("pgd", changes, **_SUPERVISED, **freelb_ball(task))

    @classmethod
    def fgm(cls, **changes: Any) -> Self:
        """The fast gradient method on text: the clean loss and that one normalised gradient step away.

            loss = L(e) + L(e + epsilon g / ||g||),  g = dL/de, l2 per sequence

        The backward of the clean pass gives g, so a step costs two of the standard ones. epsilon is 5, for embeddings
        normalised to mean 0 and variance 1: elsewhere set ``step_size`` and ``epsilon``, which ``units="std"`` takes as
        shares of the norm of a sequence (5 is 5/sqrt(n) of that of n such elements). Needs
        :meth:`AdversarialObjective.backward`.

        Source: Miyato et al., arXiv:1605.07725.
        """
        ball = {"std": 0.0, "step_size": 5.0, "epsilon": 5.0, "norm": "l2", "normalize": "l2", "level": "sequence"}
        weights = {**_SUPERVISED, "adversarial_weight": 2.0}  # each of the two passes has half of it
        return cls._preset("fgm", changes, **weights, **ball, backward="accumulate")

    @classmethod
    def freeat(cls, task: str = "rte", **changes: Any) -> Self:
        """Free adversarial training: every minibatch is replayed, parameters and delta both climb at each replay.

            K + 1 times, of one backward: parameters <- optimizer(dL(e + delta)); delta as in :meth:`freelb`

        Each batch begins with a new delta, as in the comparison of the FreeLB paper: one that is kept from batch to
        batch, as for images, would belong to other tokens. Dropout is drawn anew at each replay. Needs
        :meth:`AdversarialObjective.backward` with ``update=``.

        Args:
            task: GLUE task whose constants are taken, of ``FREELB_GLUE``.

        Source: Shafahi et al., arXiv:1904.12843; constants: ``FREELB_GLUE``.
        """
        ball = freelb_ball(task)
        return cls._preset("freeat", changes, **_SUPERVISED, **ball, backward="replay", dropout="independent")

    @classmethod
    def yopo(cls, task: str = "rte", **changes: Any) -> Self:
        """YOPO-m-n: :meth:`freelb` whose ascents take n steps through the first layer alone.

            p = dL/df_0(e + delta); n times: delta <- Pi(delta + step_size h / ||h||), h = d(p . f_0(e + delta))/d delta

        p comes from the backward that trains; m is ``steps``, n is ``inner_steps``, 3. f_0 ends at the model's first
        transformer layer, or at the module that ``first_layer`` names. Needs :meth:`AdversarialObjective.backward`.

        Args:
            task: GLUE task whose constants are taken, of ``FREELB_GLUE``.

        Source: Zhang et al., arXiv:1905.00877, as compared by Zhu et al., arXiv:1909.11764; constants:
        ``FREELB_GLUE`` (the launch scripts divide the step by n for MRPC, and halve it for RTE).
        """
        return cls._preset(
            "yopo",
            changes,
            **_SUPERVISED,
            **freelb_ball(task),
            backward="accumulate",
            inner_steps=3,
        )

    @classmethod
    def llr(cls, **changes: Any) -> Self:
        """Local linearity regularisation: the task's loss is trained to be linear around the clean embeddings.

            gamma(delta) = |l(e + delta) - l(e) - delta . dl/de|,  l of one sample; delta climbs gamma in the ball
            loss = L(e) + linearity gamma(delta_K) + linearity_gradient |delta_K . dl/de|        means over the samples

        dl/de is differentiated again, so the step needs second derivatives of the model. Attention of
        ``torch.nn.functional.scaled_dot_product_attention`` therefore runs as plain matrix products, and a language
        model goes through its logits. Flash attention is refused, and for a compiled model torch raises; of other fused
        layers that hide their backward from autograd, the second derivative would be missing in silence. Checkpointed
        layers recompute their attention outside of the step: load such a model with ``attn_implementation="eager"``.
        ``proximal`` combines with it.

        The weights (lambda 4, mu 3) are those of public implementations for CIFAR-10. Their epsilon is of images
        (8/255, l-inf: an eighth of a pixel's standard deviation), so here it is 0.1 of the root mean square of a
        sequence's embeddings: set ``epsilon``, ``std`` and ``step_size`` for your model. The two steps of epsilon / 2
        along the sign, from uniform noise in the ball, are this library's. gamma is of second order in delta: at
        SMART's 1e-5 it would be rounding noise, and in bf16 the ball has to be larger; ``signal_check_interval``
        measures it.

        The second-order counterpart of :meth:`smart`'s regulariser; that of the labels, the largest loss of the task in
        the ball, is ``adversarial_weight`` with ``ascent="task"``, as in :meth:`pgd`.

        Source: Qin et al., arXiv:1907.02610, the local linearity regulariser.
        """
        ball = {"std": 0.1, "distribution": "uniform", "step_size": 0.05, "epsilon": 0.1, "normalize": "sign"}
        weights = {"alpha": 0.0, "linearity": 4.0, "linearity_gradient": 3.0, "ascent": "linearity"}
        return cls._preset("llr", changes, **weights, **ball, steps=2, level="sequence", units="rms")

    @classmethod
    def vat(cls, **changes: Any) -> Self:
        """Virtual adversarial training: a power iteration for the direction of largest KL, without labels.

            loss = L(e) + KL(f(e) || f(e + step_size d)), d <- g / ||g|| at e + std d, l2 per sequence, f(e) constant

        std (xi) 0.1 and step_size (epsilon) 5 are for embeddings normalised to mean 0 and variance 1: elsewhere set
        ``std``, ``step_size`` and ``epsilon``, which ``units="std"`` takes as shares of the norm of a sequence (5 is
        5/sqrt(n) of that of n such elements). The first direction has the length xi on average.

        Source: Miyato et al., arXiv:1704.03976; its constants on text arXiv:1605.07725.
        """
        return cls._preset(
            "vat",
            changes,
            divergence="kl",
            ascent_divergence="kl",
            gradient="detach_clean",
            update="replace",
            std=0.1,
            noise_level="group",
            step_size=5.0,
            epsilon=5.0,
            norm="l2",
            normalize="l2",
            level="sequence",
        )

    @classmethod
    def sift(cls, **changes: Any) -> Self:
        """Scale-invariant fine-tuning: ALUM's regulariser on embeddings normalised to mean 0 and variance 1.

            delta = delta_0 + step_size g / max|g| per token, added to the normalised input of the embeddings' norm

        A layer norm gives the same for its input and for the normalised input, so the perturbation is added in units of
        each token's standard deviation and the clean pass stays as it is. delta_0 ~ N(0, 1e-2) (the authors' code cuts
        it off at twice that), eta 1e-4, no ball; the embeddings before the layer norm are not trained by the perturbed
        pass, targets are detached, dropout is independent; weight 5.

        Source: He et al., arXiv:2006.03654; constants: https://github.com/microsoft/DeBERTa (DeBERTa/sift).
        """
        return cls._preset(
            "sift",
            changes,
            alpha=5.0,
            std=1e-2,
            step_size=1e-4,
            norm="none",
            normalize="linf",
            units="std",
            site="embedding_norm_input",
            detach_embeddings=True,
            gradient="detach_targets",
            dropout="independent",
        )

    @classmethod
    def r3f(cls, **changes: Any) -> Self:
        """R3F: noise only, no ascent; the control in every comparison of adversaries.

            loss = L(e) + alpha sKL(f(e + delta_0), f(e))

        Normal noise; ``distribution="uniform"`` is the paper's other choice.

        Source: Aghajanyan et al., arXiv:2008.03156, equation 3 (sigma 1e-5, lambda 1).
        """
        return cls._preset("r3f", changes, steps=0, step_size=0.0, norm="none")

    @classmethod
    def rdrop(cls, **changes: Any) -> Self:
        """R-Drop: two passes that differ in their dropout alone, trained to agree; the control without any noise.

            loss = L(f_1) + L(f_2) + alpha sKL(f_1, f_2)

        ``alpha`` of this config is the published alpha/2; 0.5 stands for the published 1.

        Source: Liang et al., arXiv:2106.14448.
        """
        return cls._preset(
            "rdrop",
            changes,
            alpha=0.5,
            adversarial_weight=1.0,
            steps=0,
            std=0.0,
            step_size=0.0,
            norm="none",
            dropout="independent",
        )

    @classmethod
    def neftune(cls, **changes: Any) -> Self:
        """NEFTune: the task's loss at noisy embeddings; one pass.

            loss = L(e + delta_0),  delta_0 = std U(-1, 1) / sqrt(n),  n elements of the sequence's valid tokens

        ``std`` is the published alpha, 5 (of 5, 10, 15).

        Source: Jain et al., arXiv:2310.05914.
        """
        return cls._preset(
            "neftune",
            changes,
            alpha=0.0,
            clean_weight=0.0,
            adversarial_weight=1.0,
            steps=0,
            std=5.0,
            distribution="uniform",
            noise_level="group",
            step_size=0.0,
            norm="none",
            level="sequence",
        )

    @classmethod
    def _preset(cls, method: str, changes: dict[str, Any], **fields: Any) -> Self:
        return cls.from_dict({"method": method, **fields, **changes})
