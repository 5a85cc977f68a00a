"""What was done to a base: the small, versioned record that is the truth about an adapted model.

``surgery.operate`` turns a base and a plan into a model, always the same one; the adapter file carries the plan and
never a pickled graph. Everything here is a frozen value with JSON in and out, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any, Literal, TypeVar, get_args

from cadapt.errors import RefusedError
from cadapt.kinds import check_kinds
from cadapt.site import Site

PLAN_VERSION = 1

# bypass: parallel, and joined behind the layer scale that closes a branch, before its drop-path
Form = Literal["parallel", "sequential", "bypass"]
BnPolicy = Literal["frozen", "train"]
BaseSource = Literal["pretrained", "checkpoint", "random", "given"]
Json = Any


@dataclass(frozen=True, kw_only=True)
class Base:
    """Which backbone a plan was made for: enough to build it again, and to refuse any other.

    ``sha256`` is over the names, dtypes, shapes and bytes of the backbone's tensors, the classifier left out;
    ``parameters`` counts the same tensors' parameters. ``probe`` is what the backbone computes from one fixed picture
    (means of its features): the same tensors in a model created with other settings give others. ``checkpoint`` is a
    file name, never a path of somebody's machine. ``seed`` is that of randomly initialised weights. ``settings`` are
    the keyword arguments the architecture was created with, ``img_size`` for example. ``source`` "given" is a model
    made by the caller.
    """

    name: str
    source: BaseSource
    parameters: int
    sha256: str
    checkpoint: str | None = None
    seed: int | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    probe: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """One adapter: where it joins, by which scheme and form, and its resolved settings."""

    site: Site
    scheme: str
    form: Form
    config: Mapping[str, Json] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[tuple[str, Json], ...]:
        """The config as a value that can be a key: a file has lists where a scheme has tuples."""
        return tuple(
            (name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(self.config.items())
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """The task's own classifier, which stands beside the base's and is fed what the base's would be.

    ``path`` is the base's classifier; where it has several (distilled models), ``others`` are the rest, each with a new
    one of its own, which the base joins as it joins its own. ``init`` says whether the new one starts as a copy of it
    (``base``) or fresh from ``seed`` (``new``). ``norm`` puts a fresh LayerNorm, ``dropout`` a dropout of that rate
    before it.
    """

    path: str
    num_classes: int
    init: Literal["new", "base"] = "new"
    norm: bool = False
    dropout: float = 0.0
    seed: int = 0
    others: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The base's classifiers that the task's stand in for."""
        return (self.path, *self.others)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that turns a base into the adapted model.

    ``scheme`` and ``settings`` are as the user gave them. ``trainable`` names the base's own tensors that the
    scheme trains (none for an adapter); adapters and head always train. ``deltas`` names base tensors that the task
    adds a learned difference to, which starts at zero; a name may be that of a bias which the base's layer lacks.
    ``seed`` initialises the adapters.
    """

    base: Base
    scheme: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    insertions: tuple[Insertion, ...] = ()
    trainable: tuple[str, ...] = ()
    deltas: tuple[str, ...] = ()
    head: Head | None = None
    bn_policy: BnPolicy = "frozen"
    seed: int = 0
    version: int = PLAN_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that :meth:`from_json` reads back to an equal plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        """Read a plan back from a file that may be damaged, foreign or of a later version.

        Raises:
            RefusedError: the version is unknown, or a field is missing or of the wrong kind.
        """
        version = record.get("version")
        if version != PLAN_VERSION:
            raise RefusedError(
                f"plan version {version!r} is not known here, expected {PLAN_VERSION}",
                hint="upgrade cadapt: pip install -U cadapt",
            )
        values = _known(cls, record)
        values["base"] = _read_base(record.get("base"))
        values["head"] = _read_head(record.get("head"))
        values["insertions"] = tuple(_read_insertion(item) for item in _list(record, "insertions"))
        values["trainable"] = tuple(_list(record, "trainable"))
        values["deltas"] = tuple(_list(record, "deltas"))
        return _in_range(_construct(cls, values))


_MOST_CLASSES = 10_000_000
_SEEDS = range(2**63)


def _in_range(plan: Plan) -> Plan:
    """Refuse what no plan of ours holds, before anything is built from it."""
    head = plan.head
    sound = {
        "seed": plan.seed in _SEEDS and (plan.base.seed is None or plan.base.seed in _SEEDS),
        "deltas": len(set(plan.deltas)) == len(plan.deltas),
        "head": head is None
        or (0 < head.num_classes <= _MOST_CLASSES and 0 <= head.dropout < 1 and head.seed in _SEEDS),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise RefusedError(f"damaged plan: {name} is out of range")
    return plan


Value = TypeVar("Value")


def _known(cls: type, record: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(cls)}
    return {key: value for key, value in record.items() if key in names}


def _construct(cls: type[Value], values: Mapping[str, Any]) -> Value:
    check_kinds(cls, values)
    try:
        return cls(**values)
    except TypeError as error:
        raise RefusedError(f"damaged plan: {cls.__name__}: {error}") from error


def _read(cls: type[Value], record: object) -> Value:
    if not isinstance(record, Mapping):
        raise RefusedError(f"damaged plan: {cls.__name__} is {record!r:.60}, expected an object")
    return _construct(cls, _known(cls, record))


def _read_head(record: object) -> Head | None:
    if isinstance(record, Mapping):
        record = {**record, "others": tuple(_list(record, "others"))}
    return None if record is None else _read(Head, record)


def _read_base(record: object) -> Base:
    if isinstance(record, Mapping):
        record = {**record, "probe": tuple(_list(record, "probe"))}
    base = _read(Base, record)
    if base.checkpoint is not None and base.checkpoint != PurePath(base.checkpoint).name:
        # it is joined to a folder later, and must not lead out of it
        raise RefusedError(f"damaged plan: checkpoint {base.checkpoint!r:.60} is a path, expected a file name")
    return base


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list | tuple):
        raise RefusedError(f"damaged plan: {key} is {value!r:.60}, expected a list")
    return list(value)


def _read_insertion(record: object) -> Insertion:
    if not isinstance(record, Mapping) or not isinstance(record.get("site"), Mapping):
        raise RefusedError(f"damaged plan: not an insertion: {record!r:.120}")
    values = _known(Insertion, record)
    values["site"] = Site.from_json(record["site"])
    if values.get("form") not in get_args(Form):
        raise RefusedError(f"damaged plan: form {values.get('form')!r} at '{values['site'].name}'")
    return _construct(Insertion, values)
