"""Rules of shape that only some families have: routing groups, and shared experts whose width the experts' implies.

Shape letters: E experts, F expert width.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from slimmoe_hf.families import family_of, routing_groups, shape_of


def check_groups(config: PreTrainedConfig, experts: int) -> None:
    """Raise ValueError unless `experts` a layer can be dealt into the model's routing groups.

    Every group has to keep as many, for the router tells them apart by their place; two at least, for some routers know
    a group by its two best; and together those that a token may take from have to hold all that it takes.
    """
    family, shape, (groups, kept) = family_of(config), shape_of(config), routing_groups(config)
    if family.routing_keys is None or experts == shape.num_experts:
        return
    each = max(2, -(-shape.top_k // kept))
    legal = list(range(groups * each, shape.num_experts + 1, groups))
    if experts not in legal:
        listed = ", ".join(map(str, legal if len(legal) <= 6 else [*legal[:3], "...", *legal[-2:]]))
        raise ValueError(
            f"num_experts={experts} cannot be had: the router deals experts into {groups} groups "
            f"({family.routing_keys[0]}) and a token takes {shape.top_k} from {kept} of them. Possible: {listed}."
        )


def check_shared(config: PreTrainedConfig, width: int) -> None:
    """Raise ValueError unless the shared experts stay as wide as they are when the others get `width`.

    They are F times a whole number wide. Halving F and doubling the number leaves them whole.
    """
    key, before = family_of(config).shared_key, shape_of(config).expert_width
    times = 0 if key is None else getattr(config, key) or 0
    whole = times * before
    if whole and whole % width:
        legal = [number for number in range(8, before + 1, 8) if whole % number == 0]
        near = sorted(legal, key=lambda number: abs(number - width))[:4]
        raise ValueError(
            f"expert_width={width} cannot be had: the shared experts are {key} times the expert width, {whole} neurons, and "
            f"{width} does not divide that. Nearest: {', '.join(map(str, sorted(near))) or before}."
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
