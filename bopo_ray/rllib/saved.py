"""A saved router's folder, an RLModule checkpoint, and the module in it that acts.

Always true here: a folder is only read as data, of the few types that a router consists of, so that one from elsewhere
runs no code and names no place in memory; and a module that is returned has every weight, finite and in the shape that
the folder states.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.rllib.router_module import RouterModule

__all__ = ["ROUTER_FILE", "about", "acting_module", "check_pair"]

ROUTER_FILE = "router.json"
"""Beside a router's weights: what of it is no part of an exported model, and what is known of it."""
METADATA, ARGUMENTS, WEIGHTS = "metadata.json", "class_and_ctor_args.pkl", "module_state.pkl"
"""Of RLlib: its version, the module's class and constructor arguments, the state."""
MEND = "copy the folder anew, or train the router again"
AVERAGE, POLICY = "average.", "policy."

_TYPES = {
    "bopo_ray.rllib.router_module": ("RouterModule",),
    "collections": ("OrderedDict",),
    "gymnasium.spaces.box": ("Box",),
    "gymnasium.spaces.discrete": ("Discrete",),
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
}


def acting_module(folder: Path) -> RouterModule:
    """The router to act with: the average of the policy over its updates, without what only training needs.

    Raises StoreError for a folder that is no router's, or a damaged one.
    """
    _check(folder)
    path = folder / ARGUMENTS
    saved = _unpickled(path)
    try:
        if saved["class"] is not RouterModule:
            raise TypeError("its class is not RouterModule")
        args, kwargs = saved["ctor_args_and_kwargs"]
        shape = dict(kwargs["model_config"])
        if shape.get("backbone") and not shape["lora_rank"]:
            shape["backbone"] = str(folder.resolve())  # it holds the whole model; where that came from may be gone
        with _quiet():
            module = RouterModule(*args, **{**kwargs, "model_config": shape, "inference_only": True})
    except ConfigError as error:
        raise StoreError(f"{folder} can't be loaded: {error}") from error
    except Exception as error:  # whatever a constructor does with damaged arguments
        raise StoreError(f"{path} is damaged: no router can be made of it ({type(error).__name__}); {MEND}") from error
    module.set_state(_average(folder / WEIGHTS, {k: tuple(v.shape) for k, v in module.state_dict().items()}))
    module.eval()
    return module


def about(folder: Path) -> dict[str, Any]:
    """What `router.json` says of a router; nothing where there is none. Raises StoreError for a damaged one."""
    path = folder / ROUTER_FILE
    if not path.exists():
        return {}
    try:
        known: Any = json.loads(path.read_text())
        if not (isinstance(known, dict) and isinstance(known.get("trained", {}), dict)):
            raise TypeError("need an object, and in it another one")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}); {MEND}") from error
    return known


def check_pair(folder: Path, models: Sequence[str], price_hash: str, mend: str) -> None:
    """Raises StoreError for a router that was trained to choose between other models than these, or at other prices, or
    whose `router.json` can't be."""
    trained = about(folder).get("trained")
    if trained is None:  # of a version that did not say
        return
    try:
        names, prices = [m["name"] for m in trained["models"]], trained["price_hash"]
        if not all(isinstance(said, str) and said.isprintable() for said in (*names, prices)):
            raise TypeError("need texts")
    except (KeyError, TypeError) as error:
        what = "does not say which models and prices the router was trained for"
        raise StoreError(f"{folder / ROUTER_FILE} {what} ({type(error).__name__}); {MEND}") from error
    for what, old, new in (
        (f"{len(names)} models", ", ".join(names), ", ".join(models)),
        ("price table", prices, price_hash),
    ):
        if old != new:
            raise StoreError(f"{folder} was trained for the {what} {old}; here it is to be used for {new}; {mend}")


def _check(folder: Path) -> None:
    """Is this a router's folder?"""
    missing = [name for name in (METADATA, ARGUMENTS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        what = f"{missing[0]} is missing in it" if folder.is_dir() else "there is no such folder"
        there = [*folder.glob(f"policies/*/{METADATA}"), *folder.glob(f"*/{METADATA}")]
        names = sorted(p.parent.relative_to(folder).as_posix() for p in there)
        hint = f", of which there are {', '.join(names)} here" if names else ""
        raise StoreError(f"{folder} is not a saved router: {what}; a run saves its own in RUN/policies/NAME{hint}")
    try:
        json.loads((folder / METADATA).read_text())["checkpoint_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{folder / METADATA} is damaged ({type(error).__name__}); {MEND}") from error


def _average(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The averaged weights under the policy's names."""
    state = _unpickled(path)
    if not isinstance(state, dict) or not all(isinstance(v, np.ndarray) for v in state.values()):
        raise StoreError(f"{path} is damaged: it holds no weights by name; {MEND}")
    found = {POLICY + str(k).removeprefix(AVERAGE): v for k, v in state.items() if str(k).startswith(AVERAGE)}
    if not found:
        raise StoreError(f"{path} has no averaged weights; a whole router has them: {MEND} with this version")
    for what, names in (
        ("missing", [k for k in shapes if k not in found]),
        ("of another shape", [k for k, shape in shapes.items() if k in found and found[k].shape != shape]),
        ("unknown", [k for k in found if k not in shapes]),
        ("not finite", [k for k, v in found.items() if v.dtype.kind != "f" or not np.isfinite(v).all()]),
    ):
        if names:
            raise StoreError(f"{path} is damaged: {len(names)} of {len(shapes)} weights {what}, {names[0]}; {MEND}")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that every RLModule gives of a class that RLlib itself makes."""
    log = logging.getLogger("ray._common.deprecation")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _dtype(code: str, *_: object) -> np.dtype[Any]:
    """Of numbers. Any other could be told that the bytes of a file are addresses of objects."""
    if not re.fullmatch("b1|[fiu][1248]", code):
        raise pickle.UnpicklingError("an array of such a type is no part of a router")
    return np.dtype(code)


def _array(*_: object) -> np.ndarray[Any, Any]:
    """As numpy begins one: what it holds is set afterwards."""
    return np.empty(0, np.int8)


_OWN = {"dtype": _dtype, "ndarray": "ndarray", "_reconstruct": _array}
"""In place of numpy's, which take whatever they are given: `ndarray` makes objects of bytes, too."""


class _Data(pickle._Unpickler):
    """Reads the types of a router and nothing else. The reader written in C would set any state of them."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in _TYPES.get(module.replace("numpy.core.", "numpy._core."), ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a router")
        return _OWN[name] if name in _OWN else super().find_class(module, name)

    def load_build(self) -> None:
        """Sets the state of an array, once, or of a space. A dtype has its own already; of a class or a function it
        would change this process."""
        part, state = self.stack[-2:]  # type: ignore[attr-defined]
        if isinstance(part, np.dtype) and state == part.__reduce__()[2]:
            self.stack.pop()  # type: ignore[attr-defined]
        elif type(part) in (Box, Discrete) or (type(part) is np.ndarray and not part.size):
            super().load_build()  # type: ignore[misc]
        else:
            raise pickle.UnpicklingError(f"such a state of {type(part).__name__} is no part of a router")

    dispatch[pickle.BUILD[0]] = load_build


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Data(file).load()
    except Exception as error:  # damaged bytes can raise anything
        raise StoreError(
            f"{path} can't be read ({' '.join(str(error).split()) or type(error).__name__}); {MEND}"
        ) from error
