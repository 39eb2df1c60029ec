"""Patched models in lm-evaluation-harness, under the model name ``thinkkv``.

    python -m thinkkv.sdk.evaluation.harness run --model thinkkv --model_args pretrained=M,policy=task-kv,ratio=0.25 ...

The command line is the harness's own. A cache is compressed after the prompt, so only tasks that generate say something
about a policy; in tasks that score given answers (``loglikelihood``) the whole text is the prompt, and nothing is left
out of it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from thinkkv import sdk
from thinkkv.sdk.policies import CacheDtype


@register_model("thinkkv")
class PatchedModel(HFLM):
    """The harness's transformers model, with per-head cache budgets.

    Args:
        pretrained: what ``sdk.load`` takes: alias, hub id, folder or GGUF file.
        policy, ratio, profile, cache_dtype: as in ``sdk.apply``.
        dtype: as in ``sdk.load``.
        options: the harness's own, ``batch_size`` and ``device`` among them.

    Attributes:
        handle: of the patch.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "task-kv",
        ratio: float | None = None,
        profile: str | None = None,
        cache_dtype: CacheDtype | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        model, tokenizer = sdk.load(pretrained, dtype=dtype)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.handle = sdk.apply(self.model, policy=policy, ratio=ratio, profile=profile, cache_dtype=cache_dtype)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
