"""Builds our own world on AppWorld's engine: `python build.py ROOT SEED TRAIN DEV TEST`, in AppWorld's virtual
environment; the last three say how many tasks of each kind.

Writes ROOT/data as `appworld download data` would: the API documents and empty apps are made from the installed
engine, the people, tasks and evaluations are ours (`kinds`). Same seed, same world. Only the engine's models write
databases. Prints nothing; ROOT must not exist yet.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import kinds  # noqa: E402


def main(root: Path, seed: int, counts: dict[str, int]) -> None:
    from appworld import update_root
    from appworld.apps.api_lib import set_local_date_and_time

    update_root(str(root))
    data = root / "data"
    _api_docs(data)
    clock = set_local_date_and_time(datetime.fromisoformat(kinds.NOW))
    _base(data)
    drawn = {kind: kinds.draw_all(kind, sum(counts.values()), seed) for kind in kinds.KINDS}
    for split, ids in task_ids(counts).items():
        _write(data / "datasets" / f"{split}.txt", "\n".join(ids) + "\n")
        for task_id in ids:
            kind, _, number = task_id.rpartition("_")
            _task(data, task_id, *drawn[kind][int(number) - 1])
    clock.stop()


def task_ids(counts: dict[str, int]) -> dict[str, list[str]]:
    """The tasks of each data set, kind after kind, numbered through the data sets from 1."""
    start, ids = 1, {}
    for split, count in counts.items():
        name = "test_normal" if split == "test" else split
        ids[name] = [f"{kind}_{number}" for kind in kinds.KINDS for number in range(start, start + count)]
        start += count
    return ids


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")


def _api_docs(data: Path) -> None:
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.common.constants import CANARY_STRING

    docs = ApiDocCollection.build(load_apps=tuple(get_all_apps(skip_admin=True)))
    for app, apis in docs.items():
        marked = {name: {**doc, "canary_string": CANARY_STRING} for name, doc in apis.items()}
        _write(data / "api_docs" / "standard" / f"{app}.json", marked)


@contextmanager
def _models(source: str, target: str, *, create: bool = False) -> Iterator[Any]:
    from appworld.apps import get_all_apps
    from appworld.apps.model_lib import CachedDBHandler
    from appworld.collections.models import ModelCollection

    models = ModelCollection.load(target, source, load_apps=get_all_apps(), create_db=create)
    yield models
    CachedDBHandler.reset()


def _base(data: Path) -> None:
    """Everybody's accounts and contacts."""
    with _models(":memory:build", ":memory:build", create=True) as models:
        for person in kinds.PEOPLE:
            _account(models, person)
        for me in kinds.SUPERVISORS:
            for person, relationship in kinds.contacts_of(me).items():
                models.phone.Contact.create_save(
                    user_id=me.number, first_name=person.first, last_name=person.last, email=person.email,
                    phone_number=person.phone, relationships=[relationship],
                )  # fmt: skip
        docs = data / "api_docs" / "standard"
        for path in sorted(docs.glob("*.json")):
            for doc in json.loads(path.read_text(encoding="utf-8")).values():
                del doc["canary_string"]
                models.api_docs.ApiDoc.create_save(app_name_=doc.pop("app_name"), **doc)
        models.save(str(data / "base_dbs"), format="full", save_model_hashes=True)


def _account(models: Any, person: kinds.Person) -> None:
    name = {"first_name": person.first, "last_name": person.last}
    who = {**name, "email": person.email, "phone_number": person.phone}
    if person in kinds.SUPERVISORS:  # the engine wants their first names unique
        models.admin.MainUser.create_save(**who, birthday="1990-01-01", sex="female")
    for app, app_models in models.items():
        user: Callable[..., Any] | None = getattr(app_models.get("User"), "create_save", None)
        if user is None or app == "admin":
            continue
        fields: dict[str, Any] = {"phone_number": person.phone} if app == "phone" else {"email": person.email}
        known = app_models["User"].schema()["properties"]
        more = {"verified": True, "venmo_balance": kinds.BALANCE}
        fields |= {key: value for key, value in more.items() if key in known}
        user(**name, **fields, password=person.password)


def _task(data: Path, task_id: str, me: kinds.Person, spec: kinds.Spec) -> None:
    folder = data / "tasks" / task_id
    who = {"first_name": me.first, "last_name": me.last, "email": me.email, "phone_number": me.phone}
    with _models(str(data / "base_dbs"), f":memory:task_input-{task_id}") as models:
        supervisor = models.supervisor.Supervisor.create_save(**who, birthday="1990-01-01", sex="female")
        for app, app_models in models.items():
            if "User" in app_models and app != "admin":
                models.supervisor.AccountPassword.create_save(
                    supervisor_id=supervisor.id, account_name=app, password=me.password
                )
        models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction=spec.instruction)
        for name, fields in spec.rows:
            app, _, model = name.partition(".")
            models[app][model].create_save(**fields)
        models.save(str(folder / "dbs"), format="changes", save_model_hashes=True)
    _write(
        folder / "specs.json",
        {"instruction": spec.instruction, "supervisor": who, "datetime": kinds.NOW, "db_version": "0.1.0"},
    )
    _ground_truth(folder / "ground_truth", spec)


def _ground_truth(folder: Path, spec: kinds.Spec) -> None:
    requirements = [
        "The task is marked as done, with the right answer.",
        "Nothing but what the task needs has changed.",
    ]
    requirements += [f"The right records of {model} have changed." for model in spec.expected]
    labels = ["no_op_fail", "no_op_fail" if spec.expected else "no_op_pass", *("no_op_fail" for _ in spec.expected)]
    plan = spec.plan()
    calls = sum(line.count("apis.") for line in plan)
    _write(folder / "public_data.json", {})
    _write(folder / "private_data.json", {"requirements": requirements, "expected": spec.expected})
    _write(folder / "answer.json", json.dumps(spec.answer))
    tests = [{"requirement": r, "label": label} for r, label in zip(requirements, labels, strict=True)]
    _write(folder / "test_data.json", tests)
    sizes = {
        "num_apps": len(spec.apps),
        "num_apis": calls,
        "num_api_calls": calls,
        "num_solution_code_lines": len(plan),
    }
    _write(folder / "metadata.json", {"difficulty": 1, "mode": "minimal", **sizes})
    _write(folder / "plan.json", {"right": plan, "wrong": spec.plan(wrong=True)})
    shutil.copyfile(HERE / "check.py", folder / "evaluation.py")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), dict(zip(kinds.COUNTS, map(int, sys.argv[3:]), strict=True)))
