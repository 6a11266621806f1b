"""Our own tasks for AppWorld's engine: what each asks, what it starts from, how it is solved and what must change.

Read by `build`, in AppWorld's virtual environment; needs nothing but the standard library. A task is one draw of
its kind. Each line of a plan is one action: lines of at most 200 characters, run one after the other in the same
interpreter, the last one completing the task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "BALANCE", "COUNTS", "KINDS", "NOW", "PEOPLE", "RELATIONSHIPS", "SUPERVISORS", "Person", "Spec", "contacts_of",
    "draw", "draw_all",
]  # fmt: skip

NOW = "2024-03-14T10:00:00"
BALANCE = 1000.0
"""Dollars that everybody has on Venmo at the start."""
COUNTS = {"train": 8, "dev": 3, "test": 4}
"""Tasks of each kind in each split, unless other counts are asked for."""


@dataclass(frozen=True)
class Person:
    """Somebody with an account in every app; the number is the id in all of them."""

    number: int
    first: str
    last: str

    @property
    def email(self) -> str:
        return f"{self.first}.{self.last}@example.com".lower()

    @property
    def phone(self) -> str:
        return f"555{self.number:07d}"

    @property
    def password(self) -> str:
        return f"{self.last.lower()}-{self.number * 7919 % 10007}"


_NAMES = (
    "Ada Brook", "Ben Castle", "Clara Dune", "David Elm", "Ada Frost", "Felix Grove", "Grace Hill", "Ben Ivory",
    "Clara Jones", "Kurt Lake", "Mira Moss", "Felix North", "Nora Oak", "Paul Pine", "Mira Quill", "Rosa Stone",
)  # fmt: skip
PEOPLE = tuple(Person(at, *name.split()) for at, name in enumerate(_NAMES, start=1))
SUPERVISORS = (PEOPLE[3], PEOPLE[6], PEOPLE[9], PEOPLE[15])
"""Whose tasks they are; nobody shares a first name with them."""
RELATIONSHIPS = ("friend", "coworker", "roommate", "sibling", "neighbor")


def contacts_of(supervisor: Person) -> dict[Person, str]:
    """Everybody else and how the supervisor knows them; of two with one first name the relationships differ."""
    others = [person for person in PEOPLE if person != supervisor]
    return {p: RELATIONSHIPS[(p.number * 3 + p.number // 5 + supervisor.number) % 5] for p in others}


@dataclass
class Spec:
    """One task."""

    instruction: str
    rows: list[tuple[str, dict[str, Any]]]
    """(app.Model, fields) to create, in this order; ids of a model count from 1."""
    apps: list[str]
    """Where the solution logs in, in this order."""
    steps: list[str]
    """The solution after logging in; `wrong` differs from it in a way that a careless agent would."""
    wrong: list[str]
    expected: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """app.Model -> added, updated, removed -> fields that these records must have; no other record may change, and of
    an updated one no other field."""
    answer: int | None = None

    def plan(self, wrong: bool = False) -> list[str]:
        """The whole solution."""
        accounts = 'a["account_name"]: a["password"] for a in apis.supervisor.show_account_passwords()'
        answer = "answer=answer" if self.answer is not None else ""
        return [
            f"passwords = {{{accounts}}}",
            "me = apis.supervisor.show_profile()",
            *(_login(app) for app in self.apps),
            *(self.wrong if wrong else self.steps),
            f"apis.supervisor.complete_task({answer})",
        ]


def _login(app: str) -> str:
    user = "phone_number" if app == "phone" else "email"
    call = f'apis.{app}.login(username=me["{user}"], password=passwords["{app}"])'
    return f'{app} = {call}["access_token"]'


def _someone(rng: random.Random, me: Person) -> tuple[Person, str]:
    return rng.choice(list(contacts_of(me).items()))


def _find(person: Person, relationship: str) -> str:
    search = f'apis.phone.search_contacts(query="{person.first}", relationship="{relationship}", access_token=phone)'
    return f"contact = {search}[0]"


def _careless(person: Person, me: Person) -> str:
    """Takes a namesake, or whoever else there is."""
    other = min(contacts_of(me), key=lambda p: (p == person, p.first != person.first))
    return f'contact = {{"email": "{other.email}", "phone_number": "{other.phone}"}}'


def text_contact(rng: random.Random, me: Person) -> Spec:
    person, relationship = _someone(rng, me)
    what, hour = rng.choice(("dinner", "the concert", "the meeting", "the trip", "football")), rng.randint(1, 9)
    message = f"I will be {hour * 5} minutes late for {what}."
    send = (
        f'apis.phone.send_text_message(phone_number=contact["phone_number"], message="{message}", access_token=phone)'
    )
    return Spec(
        f'Send a text message to my {relationship} {person.first}, saying exactly: "{message}"',
        [],
        ["phone"],
        [_find(person, relationship), send],
        [_careless(person, me), send],
        {
            "phone.GlobalTextMessage": {
                "added": [{"sender_id": me.number, "receiver_id": person.number, "message": message}]
            },
            "phone.UserTextMessage": {"added": [{"user_id": me.number}, {"user_id": person.number}]},
        },
    )


def move_alarm(rng: random.Random, me: Person) -> Spec:
    labels = rng.sample(("Gym", "Work", "School run", "Medicine", "Call home", "Laundry"), 4)
    hours = rng.sample(range(5, 12), 4)
    rows = [
        (
            "phone.Alarm",
            {"user_id": me.number, "time": f"{h:02d}:15", "label": name, "enabled": True, "snooze_minutes": 5,
             "vibration": False, "repeat_days": ["monday", "friday"]},
        )
        for name, h in zip(labels, hours, strict=True)
    ]  # fmt: skip
    new, snooze = f"{rng.randint(5, 11):02d}:{rng.choice((20, 40, 50))}", rng.choice((10, 15))
    update = f'apis.phone.update_alarm(alarm_id=alarm["alarm_id"], time="{new}", access_token=phone)'
    more = f'apis.phone.update_alarm(alarm_id=alarm["alarm_id"], snooze_minutes={snooze}, access_token=phone)'
    find = f'alarm = [a for a in apis.phone.show_alarms(access_token=phone) if a["label"] == "{labels[2]}"][0]'
    return Spec(
        f'Move my phone alarm "{labels[2]}" to {new} and let it snooze for {snooze} minutes.',
        rows,
        ["phone"],
        [find, update, more],
        [find, update],
        {"phone.Alarm": {"updated": [{"id": 3, "time": new, "snooze_minutes": snooze}]}},
    )


def note_total(rng: random.Random, me: Person) -> Spec:
    titles = rng.sample(("Birthday party", "New kitchen", "Camping trip", "Garden", "Office supplies", "Books"), 3)
    things = rng.sample(("paint", "lamp", "rope", "chairs", "flour", "stamps", "seeds", "tape", "candles"), 6)
    lists = [[(thing, rng.randint(3, 60)) for thing in rng.sample(things, rng.randint(3, 6))] for _ in titles]
    rows = [
        (
            "simple_note.Note",
            {"user_id": me.number, "title": f"{title} costs", "tags": ["money"], "pinned": False,
             "content": "\n".join([f"# {title}", *(f"- {thing}: ${cost}" for thing, cost in costs)])},
        )
        for title, costs in zip(titles, lists, strict=True)
    ]  # fmt: skip
    read = 'text = apis.simple_note.show_note(note_id=note["note_id"], access_token=simple_note)["content"]'
    add = 'answer = sum(int(line.split("$")[1]) for line in text.splitlines() if "$" in line)'
    find = f'note = apis.simple_note.search_notes(query="{titles[1]} costs", access_token=simple_note)[0]'
    return Spec(
        f'How many dollars do the things in my note "{titles[1]} costs" cost together?',
        rows,
        ["simple_note"],
        [find, read, add],
        [find, read, add + " + 1"],
        answer=sum(cost for _, cost in lists[1]),
    )


def shopping_tasks(rng: random.Random, me: Person) -> Spec:
    things = rng.sample(("milk", "bread", "apples", "rice", "tea", "soap", "onions", "pasta", "cheese"), 4)
    title, project = f"Shopping {rng.choice(('Monday', 'Friday', 'weekend'))}", rng.choice(("Errands", "Household"))
    rows = [
        ("simple_note.Note", {"user_id": me.number, "title": title, "content": "\n".join(f"- {t}" for t in things)}),
        ("simple_note.Note", {"user_id": me.number, "title": "Ideas", "content": "- a boat\n- a dog"}),
        *_projects(me, ("Work", project)),
    ]
    read = 'text = apis.simple_note.show_note(note_id=note["note_id"], access_token=simple_note)["content"]'
    make = 'apis.todoist.create_task(project_id=project["project_id"], title=thing, access_token=todoist)'
    steps = [
        f'note = apis.simple_note.search_notes(query="{title}", access_token=simple_note)[0]',
        read,
        'things = [line[2:] for line in text.splitlines() if line.startswith("- ")]',
        f'project = apis.todoist.show_projects(query="{project}", access_token=todoist)[0]',
        f"for thing in things: {make}",
    ]
    return Spec(
        f'Add each thing in my note "{title}" as a task to my Todoist project "{project}", in the words of the note.',
        rows,
        ["simple_note", "todoist"],
        steps,
        [*steps[:-1], f"for thing in things[1:]: {make}"],
        {"todoist.Task": {"added": [{"project_id": 2, "title": thing, "is_completed": False} for thing in things]}},
    )


def _projects(me: Person, names: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    projects = [("todoist.Project", {"user_id": me.number, "name": name}) for name in names]
    links = [
        ("todoist.ProjectCollaboratorLink", {"project_id": at, "user_id": me.number}) for at in range(1, len(names) + 1)
    ]
    return projects + links


def finish_tasks(rng: random.Random, me: Person) -> Spec:
    names = rng.sample(("Move house", "Thesis", "Wedding", "Allotment", "Car"), 2)
    titles = rng.sample(("Call the bank", "Write the list", "Buy boxes", "Book a van", "Ask Mira", "Read it again"), 6)
    priorities = ["high", "high", "medium", "low", rng.choice(("high", "medium")), "high"]
    rng.shuffle(priorities)
    rows = _projects(me, tuple(names))
    for project in (1, 2):
        rows += [
            (
                "todoist.Task",
                {"project_id": project, "user_id": me.number, "title": title, "priority": priority, "order_index": at},
            )
            for at, (title, priority) in enumerate(zip(titles, priorities, strict=True))
        ]
    done = [{"id": 7 + at, "is_completed": True} for at, priority in enumerate(priorities) if priority == "high"]
    show = 'apis.todoist.show_tasks(project_id=project["project_id"], access_token=todoist)'
    finish = 'apis.todoist.update_task(task_id=t["task_id"], is_completed=True, access_token=todoist)'
    steps = [
        f'project = apis.todoist.show_projects(query="{names[1]}", access_token=todoist)[0]',
        f'tasks = {show}["no_section_tasks"]',
        'urgent = [t for t in tasks if t["priority"] == "high"]',
        f"for t in urgent: {finish}",
    ]
    return Spec(
        f'Mark all high priority tasks of my Todoist project "{names[1]}" as completed.',
        rows,
        ["todoist"],
        steps,
        [*steps[:2], f"for t in tasks: {finish}"],
        {"todoist.Task": {"updated": done}},
    )


def pay_contact(rng: random.Random, me: Person) -> Spec:
    person, relationship = _someone(rng, me)
    amount, why = rng.randint(5, 80), rng.choice(("pizza", "train tickets", "rent", "a gift", "groceries"))
    pay = f'receiver_email=contact["email"], amount={amount}, description="{why}", access_token=venmo'
    return Spec(
        f'Send my {relationship} {person.first} ${amount} on Venmo from my balance, described as "{why}". '
        "Their email address is in my phone.",
        [],
        ["phone", "venmo"],
        [_find(person, relationship), f"apis.venmo.create_transaction({pay})"],
        [_careless(person, me), f"apis.venmo.create_transaction({pay})"],
        {
            "venmo.Transaction": {
                "added": [{"sender_id": me.number, "receiver_id": person.number, "amount": amount, "description": why}]
            },
            **_paid(me, [(person, amount)]),
        },
    )


def _paid(me: Person, payments: list[tuple[Person, int]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the app itself changes when `me` pays each of these once."""
    balances = [(me, BALANCE - sum(amount for _, amount in payments)), *((p, BALANCE + a) for p, a in payments)]
    return {
        "venmo.User": {"updated": [{"id": p.number, "venmo_balance": balance} for p, balance in balances]},
        "venmo.Notification": {"added": [{"user_id": p.number} for p, _ in payments]},
    }


def approve_requests(rng: random.Random, me: Person) -> Spec:
    people = rng.sample(sorted(contacts_of(me), key=lambda p: p.number), 5)
    limit, small = rng.randint(20, 40), rng.randint(2, 3)
    amounts = [rng.randint(4, limit) for _ in range(small)] + [rng.randint(limit + 1, 90) for _ in range(5 - small)]
    rng.shuffle(amounts)
    rows = [
        ("venmo.PaymentRequest",
         {"sender_id": p.number, "receiver_id": me.number, "amount": a, "description": "our lunch"})
        for p, a in zip(people, amounts, strict=True)
    ]  # fmt: skip
    small_ones = [(at, p, a) for at, (p, a) in enumerate(zip(people, amounts, strict=True), start=1) if a <= limit]
    approve = 'apis.venmo.approve_payment_request(payment_request_id=r["payment_request_id"], access_token=venmo)'
    steps = [
        'requests = apis.venmo.show_received_payment_requests(status="pending", access_token=venmo)',
        f'small = [r for r in requests if r["amount"] <= {limit}]',
        f"for r in small: {approve}",
    ]
    return Spec(
        f"Approve the pending payment requests on Venmo that ask me for at most ${limit}, from my balance. Leave the "
        "others as they are.",
        rows,
        ["venmo"],
        steps,
        [steps[0], f"for r in requests: {approve}"],
        {
            "venmo.Transaction": {
                "added": [{"sender_id": me.number, "receiver_id": p.number, "amount": a} for _, p, a in small_ones]
            },
            "venmo.PaymentRequest": {"updated": [{"id": at, "approved_at": NOW} for at, _, _ in small_ones]},
            **_paid(me, [(p, a) for _, p, a in small_ones]),
        },
    )


def tidy_files(rng: random.Random, me: Person) -> Spec:
    ending, folder = rng.choice(("tmp", "log", "bak")), rng.choice(("downloads", "projects", "scans"))
    names = rng.sample(("plan", "draft", "photo", "bill", "notes", "table", "letter"), 5)
    endings = [ending, ending, "txt", "md", rng.choice((ending, "txt"))]
    home = f"/home/{me.first.lower()}"
    paths = [f"{home}/{folder}/{name}.{end}" for name, end in zip(names, endings, strict=True)]
    paths += [f"{home}/documents/{names[0]}.{ending}"]
    directories = (home, f"{home}/{folder}", f"{home}/documents")
    rows: list[tuple[str, dict[str, Any]]] = [
        ("file_system.Directory", {"user_id": me.number, "path": f"{path}/"}) for path in directories
    ]
    rows += [("file_system.File", {"user_id": me.number, "path": p, "content": "text"}) for p in paths]
    gone = [{"path": path} for path in paths[:5] if path.endswith(f".{ending}")]
    show = f'apis.file_system.show_directory(directory_path="~/{folder}", access_token=file_system)'
    delete = "for path in paths: apis.file_system.delete_file(file_path=path, access_token=file_system)"
    everywhere = 'apis.file_system.show_directory(directory_path="~/", recursive=True, access_token=file_system)'
    return Spec(
        f"Delete all files that end in .{ending} from the folder ~/{folder} of my file system, and nothing else.",
        rows,
        ["file_system"],
        [f"entries = {show}", f'paths = [p for p in entries if p.endswith(".{ending}")]', delete],
        [f"entries = {everywhere}", f'paths = [p for p in entries if p.endswith(".{ending}")]', delete],
        {"file_system.File": {"removed": gone}},
    )


KINDS: dict[str, Callable[[random.Random, Person], Spec]] = {
    "text-contact": text_contact,
    "move-alarm": move_alarm,
    "note-total": note_total,
    "shopping-tasks": shopping_tasks,
    "finish-tasks": finish_tasks,
    "pay-contact": pay_contact,
    "approve-requests": approve_requests,
    "tidy-files": tidy_files,
}


def draw_all(kind: str, count: int, seed: int) -> list[tuple[Person, Spec]]:
    """Tasks 1 to `count` of a kind, no two of them alike in all; some have the same words and start from other data."""
    drawn: list[tuple[Person, Spec]] = []
    for number in range(1, count + 1):
        again = (draw(kind, number, f"{seed}/{attempt}" if attempt else seed) for attempt in range(1000))
        drawn.append(next(task for task in again if task not in drawn))
    return drawn


def draw(kind: str, number: int, seed: int | str) -> tuple[Person, Spec]:
    """Task `number` of a kind: whose it is, and what it is."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    supervisor = rng.choice(SUPERVISORS)
    return supervisor, KINDS[kind](rng, supervisor)
