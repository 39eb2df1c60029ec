"""What is compared: a cache policy, perhaps with other than its default options, at a ratio."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.policies import POLICIES, Full, Policy, policy_named
from thinkkv.sdk.profile import SCORES


@dataclass(frozen=True)
class Setting:
    """One policy at one ratio.

    Args:
        name: as on the command line: ``snapkv``, or with options ``task-kv+nearest=none+recent=128``.
        policy: without its profile.
        budget: a share of the compressed tokens' full cache.
    """

    name: str
    policy: Policy
    budget: Budget

    @property
    def ratio(self) -> float:
        """Of the budget."""
        assert self.budget.ratio is not None
        return self.budget.ratio


def settings(names: Sequence[str], ratios: Sequence[float]) -> list[Setting]:
    """Every policy at every ratio; the full cache once.

    Raises:
        BudgetError: a policy or option does not exist, or a ratio is none.
    """
    found = [(name, parse_policy(name)) for name in dict.fromkeys(names)]
    return [
        Setting(name, policy, Budget(ratio=ratio))
        for name, policy in found
        for ratio in ([1.0] if isinstance(policy, Full) else dict.fromkeys(ratios))
    ]


def parse_policy(text: str) -> Policy:
    """A policy by its name, with options behind plus signs: ``task-kv+nearest=none+beta=0.5``.

    Raises:
        BudgetError: the policy has no such option, or the value is none for it.
    """
    name, *options = text.split("+")
    policy: Any = policy_named(name)  # every policy is a dataclass
    types = typing.get_type_hints(type(policy))
    known = [field.name for field in dataclasses.fields(policy) if field.name != "head_scores"]
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in known:
            raise BudgetError(f"{name} has no option {key!r} - choose among {', '.join(known) or 'none'}")
        given[key] = _value(f"{name}+{key}", value, types[key])
    changed: Policy = dataclasses.replace(policy, **given)
    return changed


def profile_key(name: str) -> str | None:
    """Under which name the profile of a policy, options or not, is kept; None for one that takes none."""
    policy = POLICIES.get(name.split("+")[0])
    return None if policy is None or policy.profile_score is None else SCORES[policy.profile_score]


def _value(what: str, text: str, wanted: Any) -> Any:
    """A text as what a field's type admits: a number, or one of the words of a Literal."""
    choices = typing.get_args(wanted)
    if typing.get_origin(wanted) is typing.Literal:
        if text in choices:
            return text
        raise BudgetError(f"{what}={text} is no choice - use one of {', '.join(choices)}")
    kind = next(kind for kind in (int, float) if kind in (choices or (wanted,)))
    try:
        return kind(text)
    except ValueError:
        raise BudgetError(f"{what}={text} is no number - give one") from None
