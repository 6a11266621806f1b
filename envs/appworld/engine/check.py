"""The evaluation of our own tasks: copied beside each task's expectations, and called by AppWorld's evaluator."""

from datetime import datetime
from typing import Any


def evaluate(
    test: Any, public_data: Any, private_data: Any, main_user: Any, models: Any, ground_truth_answer: Any
) -> None:
    """Compares what changed with `private_data`; see `kinds.Spec` for what it holds."""
    requirements = iter(private_data["requirements"])
    with test(next(requirements)):
        given = models.end.supervisor.Task.all()[0]
        test.case(given.status, "==", "success")
        test.answer(given.answer, ground_truth_answer)
    expected = private_data["expected"]
    with test(next(requirements)):
        test.case(models.changed_model_names(), "==", set(expected))
    for model, changes in expected.items():
        with test(next(requirements)):
            found = dict(zip(("added", "updated", "removed"), models.changed_records(model), strict=True))
            for change, records in found.items():
                wanted = [sorted(fields.items()) for fields in changes.get(change, [])]
                names = set(changes[change][0]) if wanted else {"id"}
                seen = []
                for record in records:
                    also = models.changed_field_names(model, record.id) if change == "updated" else set()
                    seen.append(sorted((name, _plain(getattr(record, name))) for name in names | also))
                test.case(sorted(seen, key=str), "==", sorted(wanted, key=str))


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return value.isoformat() if isinstance(value, datetime) else value
