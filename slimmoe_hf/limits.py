"""Rules of shape that only some families have: routing groups, and shared experts whose width the experts' implies.

Shape letters: E experts, F expert width.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from slimmoe_hf.families import family_of, routing_groups, shape_of


def possible_experts(config: PreTrainedConfig) -> list[int]:
    """How many experts a layer may keep, ascending."""
    shape, least, (groups, kept) = shape_of(config), shape_of(config).top_k, routing_groups(config)
    if family_of(config).routing_keys is not None:
        least = groups * max(2, -(-shape.top_k // kept))
    return [*range(least, shape.num_experts, groups), shape.num_experts]


def possible_widths(config: PreTrainedConfig, step: int) -> list[int]:
    """Multiples of `step` that experts may be narrowed to, and the width that they have; ascending."""
    family, width = family_of(config), shape_of(config).expert_width
    whole = _shared_width(config)
    fewer = [] if family.no_width else [each for each in range(step, width, step) if whole % each == 0]
    return [*fewer, width]


def _shared_width(config: PreTrainedConfig) -> int:
    """Neurons of the shared experts, where their width is a number of times the others'; 0 without."""
    family = family_of(config)
    times = 0 if family.shared_key is None else getattr(config, family.shared_key) or 0
    return times * shape_of(config).expert_width


def check_groups(config: PreTrainedConfig, experts: int) -> None:
    """Raise ValueError unless `experts` a layer can be dealt into the model's routing groups.

    Every group has to keep as many, for the router tells them apart by their place; two at least, for some routers know
    a group by its two best; and together those that a token may take from have to hold all that it takes.
    """
    family, shape, (groups, kept) = family_of(config), shape_of(config), routing_groups(config)
    legal = possible_experts(config)
    if family.routing_keys is not None and experts not in legal:
        listed = ", ".join(map(str, legal if len(legal) <= 6 else [*legal[:3], "...", *legal[-2:]]))
        raise ValueError(
            f"num_experts={experts} cannot be had: the router deals experts into {groups} groups "
            f"({family.routing_keys[0]}) and a token takes {shape.top_k} from {kept} of them. Possible: {listed}."
        )


def check_shared(config: PreTrainedConfig, width: int) -> None:
    """Raise ValueError unless the shared experts stay as wide as they are when the others get `width`.

    They are F times a whole number wide. Halving F and doubling the number leaves them whole.
    """
    key, whole = family_of(config).shared_key, _shared_width(config)
    if whole % width:
        near = sorted(possible_widths(config, 8), key=lambda number: abs(number - width))[:4]
        raise ValueError(
            f"expert_width={width} cannot be had: the shared experts are {key} times the expert width, {whole} neurons, and "
            f"{width} does not divide that. Nearest: {', '.join(map(str, sorted(near)))}."
        )


def refuse_merging(config: PreTrainedConfig) -> None:
    """Raise ValueError if a model's experts cannot be averaged."""
    family, (groups, _) = family_of(config), routing_groups(config)
    if family.no_merge:
        raise ValueError(f"the experts of a {config.model_type} cannot be merged: {family.no_merge}.")
    if groups > 1:
        raise ValueError(
            f"the router deals experts into {groups} groups of equal size, which merging would not keep equal. Drop experts "
            "instead (num_experts of a Target)."
        )
