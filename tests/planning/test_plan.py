from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hap
from hap import Budget, HapError, Plan
from hap.planning.plan import SCHEMA, _pack, _unpack


@pytest.fixture(scope="module")
def plan(structure, sensitivity) -> Plan:
    return hap.decide(structure, sensitivity(structure), Budget(params=0.5, macs=0.6), implant_ratio=0.3)


def test_json_gives_the_same_plan(plan) -> None:
    assert any(d.prune for d in plan.decisions.values()) and plan.implants
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.structure.fingerprint == plan.structure.fingerprint
    assert again.to_json() == plan.to_json()


def test_a_plan_of_a_realistic_net_survives_json(resnet, sensitivity) -> None:
    plan = hap.decide(resnet, sensitivity(resnet), Budget(params=0.5))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert len(text) < 200_000


def test_the_read_plan_can_be_replayed(net, inputs, plan) -> None:
    small = hap.apply(net, Plan.from_json(plan.to_json()))
    assert hap.verify(net, small, plan, (inputs + 1,)).ok


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=5))
def test_packed_indices_come_back(rows) -> None:
    assert _unpack(json.loads(json.dumps(_pack(rows)))) == rows


def test_runs_are_packed() -> None:
    assert _pack([[4, 5], [6, 7], [8, 9]]) == {"start": 4, "block": 2, "units": 3}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', "{}", "\x00\x01", "[" * 100_000])
def test_other_text_is_not_a_plan(text) -> None:
    with pytest.raises(HapError, match="this is not a plan"):
        Plan.from_json(text)


def test_a_plan_cut_short_is_refused(plan) -> None:
    text = plan.to_json()
    for end in range(0, len(text), len(text) // 50):
        with pytest.raises(HapError, match="this is not a plan"):
            Plan.from_json(text[:end])


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, None, "1"])
def test_another_schema_is_refused(plan, schema) -> None:
    data = {**json.loads(plan.to_json()), "schema": schema}
    with pytest.raises(HapError, match="this plan has another schema version") as error:
        Plan.from_json(json.dumps(data))
    assert (error.value.expected, error.value.got) == (str(SCHEMA), repr(schema))


def paths(data: Any, depth: int) -> list[tuple[Any, ...]]:
    """The places of the fields in JSON, down to a depth; of a list the first item's."""
    if not depth or not isinstance(data, (dict, list)):
        return []
    items = data.items() if isinstance(data, dict) else list(enumerate(data))[:1]
    return [(key, *rest) for key, value in items for rest in ((), *paths(value, depth - 1))]


def refused(data: dict[str, Any]) -> bool:
    try:
        Plan.from_json(json.dumps(data))
    except HapError:
        return True
    return False


LIMITS = ("params", "macs", "latency", "heads")
OPTIONAL = {
    *(("budget", name) for name in LIMITS),
    *((cost, name) for cost in ("dense", "small") for name in LIMITS[2:]),
}
FREE = ("options", "implants")  # dicts with any keys


def test_every_field_is_missed(plan) -> None:
    text = plan.to_json()
    for *above, last in paths(json.loads(text), 3):
        data = json.loads(text)
        owner = data
        for key in above:
            owner = owner[key]
        if isinstance(owner, list) or (*above, last) in OPTIONAL or (above and above[0] == "options"):
            continue
        if above == ["implants"]:  # fewer implants are another plan
            continue
        del owner[last]
        assert refused(data), (*above, last)


def test_values_of_another_type_are_refused(plan) -> None:
    text = plan.to_json()
    for name in ("structure", "decisions", "implants", "budget", "dense", "small"):
        for value in (None, 3, [], "x"):
            assert refused({**json.loads(text), name: value}), (name, value)


def swap_decision(data: dict[str, Any]) -> None:
    data["decisions"]["stem"]["keep"][0] = data["decisions"]["stem"]["keep"][1]


def lose_unit(data: dict[str, Any]) -> None:
    data["decisions"]["stem"]["keep"].pop()


def no_such_unit(data: dict[str, Any]) -> None:
    data["decisions"]["stem"]["keep"].append(99)


def other_indices(data: dict[str, Any]) -> None:
    data["structure"]["families"][0]["members"][0]["indices"]["start"] = 3


def other_tensor(data: dict[str, Any]) -> None:
    data["structure"]["tensors"]["stem.weight"]["shape"][0] += 1


def unknown_form(data: dict[str, Any]) -> None:
    data["implants"]["back"] = {"indices": [0], "form": "quantum", "rank": None}


def unknown_module(data: dict[str, Any]) -> None:
    data["implants"]["nowhere"] = {"indices": [0], "form": "pointwise", "rank": None}


def no_such_filter(data: dict[str, Any]) -> None:
    data["implants"]["back"] = {"indices": [8], "form": "pointwise", "rank": None}


def pruned_filter(data: dict[str, Any]) -> None:
    gone = data["decisions"]["inner"]["prune"][0]
    data["implants"]["inner"] = {"indices": [gone], "form": "pointwise", "rank": None}


@pytest.mark.parametrize(
    "damage, message",
    [
        (swap_decision, "does not name each of its units once"),
        (lose_unit, "does not name each of its units once"),
        (no_such_unit, "does not name each of its units once"),
        (other_indices, "lies outside of"),
        (other_tensor, "does not match its fingerprint"),
        (unknown_module, "nowhere"),
        (no_such_filter, "'back' has implants for filters that are pruned or that it has not"),
        (pruned_filter, "'inner' has implants for filters that are pruned or that it has not"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    plan, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads(plan.to_json())
    damage(data)
    with pytest.raises(HapError, match="this plan is damaged") as error:
        Plan.from_json(json.dumps(data))
    assert message in error.value.got


def test_a_form_that_nobody_registered_is_named(plan) -> None:
    """The plan may be whole: forms of users' own are known only where their module was imported."""
    data = json.loads(plan.to_json())
    unknown_form(data)
    with pytest.raises(HapError, match="'back' has an implant of form 'quantum'") as error:
        Plan.from_json(json.dumps(data))
    assert error.match("import the module that registers it")


def test_a_budget_out_of_range_is_refused(plan) -> None:
    with pytest.raises(HapError, match="budget params is out of range"):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), "budget": {"params": 2.0, "macs": None}}))


def test_a_latency_may_be_over_that_of_the_dense_model() -> None:
    assert Budget(params=0.5, latency=1.2).limits == {"params": 0.5, "latency": 1.2}
    for latency in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(HapError, match=r"(?s)budget latency is out of range.*over 0"):
            Budget(latency=latency)


def test_the_words_of_a_plan_are_the_clock_s_where_it_has_spoken(plan) -> None:
    timed = dataclasses.replace(
        plan,
        dense=dataclasses.replace(plan.dense, latency=2.0),
        small=dataclasses.replace(plan.small, latency=3.0),
    )
    assert "latency 1.50x" in repr(timed)
    assert "latency 0.80x" in repr(dataclasses.replace(timed, options={"latency_measured": 0.8}))
