"""Reading compiled programs: what they send between devices."""

import collections
import json
import logging
import re

log = logging.getLogger(__name__)

_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32, "s32": 32, "u32": 32}
_BITS |= {"f64": 64, "s64": 64, "u64": 64, "s4": 4, "u4": 4}
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
_TRIPS = re.compile(r'"known_trip_count":(\{[^}]*\})')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .*compare\((.*?)\), direction=LT")


def collective_bytes(text: str) -> dict[str, int]:
    """Returns bytes that one device receives or sends in a run of a program, by kind of collective.

    Args:
      text: the compiled program, `jax.stages.Compiled.as_text()`.

    Of a collective the larger of its operand and its result is counted, which is what a ring moves up to a factor of
    (n - 1) / n, and twice that for an all-reduce. Loops count as often as they run: as the compiler notes it, or up to the number
    that the loop's counter, which starts at 0 as that of `jax.lax.scan` does, is compared with. Others count once, with a
    warning.
    """
    limits = _limits(text)
    own: dict[str, collections.Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name = found[2]
            own[name], calls[name] = collections.Counter(), []
            entry = name if found[1] else entry
            continue
        operation = _OPERATION.search(line)
        if operation and name:
            own[name][operation[2]] += _moved(line, operation)
        for called, times in _called(line, limits):
            calls.setdefault(name, []).append((called, times))

    def total(name: str, done: dict[str, collections.Counter[str]]) -> collections.Counter[str]:
        if name not in done:
            counted = collections.Counter(own.get(name, {}))
            for called, times in calls.get(name, []):
                for kind, size in total(called, done).items():
                    counted[kind] += times * size
            done[name] = counted
        return done[name]

    return dict(total(entry, {}))


def _moved(line: str, operation: re.Match[str]) -> int:
    """Bytes of the larger of a collective's operands and results, the sum of several that run as one."""
    result = [_size(*array) for array in _ARRAY.findall(operation[1])]
    moved = sum(result)
    if operation[3] and operation[2] != "all-reduce":  # a start gives operands, results, and maybe flags
        moved = max(result, default=0)
    if operation[2] == "reduce-scatter":  # not every version prints the operand's shape, so it is worked out
        groups = _GROUPS.search(line)
        ways = 1 if groups is None else int(groups[1]) if groups[1] else len(groups[2].split(","))
        moved *= ways if not operation[3] else 1
    return moved * (2 if operation[2] == "all-reduce" else 1)


def _size(kind: str, shape: str) -> int:
    count = 1
    for side in filter(None, shape.split(",")):
        count *= int(side)
    bits = _BITS.get(kind, 8 if kind.startswith("f8") else 0)
    return count * bits // 8


def _limits(text: str) -> dict[str, int]:
    """Returns what each computation that ends in `counter < constant`, as a loop's condition does, compares with."""
    limits: dict[str, int] = {}
    name, constants = "", {}
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name, constants = found[2], {}
        constant, below = _CONSTANT.search(line), _BELOW.search(line)
        if constant:
            constants[constant[1]] = int(constant[2])
        if below:
            for operand in re.findall(r"%([\w.\-]+)", below[1])[1:]:
                if operand in constants:
                    limits[name] = constants[operand]
    return limits


def _called(line: str, limits: dict[str, int]) -> list[tuple[str, int]]:
    times = 1
    condition, trips = _CONDITION.search(line), _TRIPS.search(line)
    if trips:
        times = int(json.loads(trips[1])["n"])
    elif condition and condition[1] in limits:
        times = limits[condition[1]]
    elif condition:
        log.warning("It is not known how often the loop %s runs; what it sends is counted once.", condition[1])
    called = [(name, times if role == "body" else 1) for role, name in _CALLED.findall(line)]
    for names in _BRANCHES.findall(line):
        called += [(name.strip().lstrip("%"), 1) for name in names.split(",")]
    return called
