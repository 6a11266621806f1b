"""Small trained baselines: a task-level router (regression or nearest neighbours) and a greedy one-step preference.

Both learn from the boundary rollouts of a run's training tasks, on words (TF-IDF), with scikit-learn. That is imported
where it is used: it takes a second, and most processes never need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bopo_ray.agent import episode_views, read_view
from bopo_ray.records import Difficulty, Episode
from bopo_ray.routers.cascade import failures
from bopo_ray.routers.protocol import Moment, Router, one_hot

__all__ = ["Lesson", "OneStep", "TaskLevel", "one_step", "task_knn", "task_level"]

RECENT = 2
"""History lines that the one-step preference reads beside the task."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training task: what its boundary rollouts showed."""

    text: str
    """The task's description."""
    difficulty: Difficulty
    episodes: tuple[Episode, ...]
    """Of both boundary policies."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskLevel:
    """LARGE throughout where the task's text says that it is Hard, SMALL throughout elsewhere, as RouteLLM decides."""

    model: Any
    """A scikit-learn classifier of texts."""
    threshold: float
    """LARGE from this probability of Hard on."""

    def __call__(self, moment: Moment) -> tuple[float, ...]:
        hard = _p_true(self.model, read_view(moment.view).task) >= self.threshold
        return one_hot(moment.n_models - 1 if hard else 0, moment.n_models)


@dataclass(frozen=True, slots=True, eq=False)
class OneStep:
    """LARGE where it lowers the probability that this very step fails by enough; what comes later is not its concern.

    A greedy preference between the two models' next steps. [ours]
    """

    small: Any
    """Scikit-learn classifiers: does a step of this model fail, given what the router sees?"""
    large: Any
    margin: float
    """The least gain in the probability of a good step."""

    def __call__(self, moment: Moment) -> tuple[float, ...]:
        text = _recent(moment.view)
        gain = _p_true(self.small, text) - _p_true(self.large, text)
        return one_hot(moment.n_models - 1 if gain >= self.margin else 0, moment.n_models)


def task_level(lessons: Sequence[Lesson], threshold: float) -> Router:
    """Logistic regression on the words of the tasks."""
    from sklearn.linear_model import LogisticRegression

    return TaskLevel(_fit(LogisticRegression(C=10.0), *_tasks(lessons)), threshold)


def task_knn(lessons: Sequence[Lesson], k: float) -> Router:
    """A vote of the k training tasks whose words are nearest by their cosine."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(min(int(k), len(lessons)), metric="cosine")
    return TaskLevel(_fit(neighbours, *_tasks(lessons)), 0.5)


def one_step(lessons: Sequence[Lesson], margin: float) -> Router:
    """Two logistic regressions on the words of the view: which steps of SMALL, and which of LARGE, fail."""
    from sklearn.linear_model import LogisticRegression

    texts: tuple[list[str], list[str]] = [], []
    failed: tuple[list[bool], list[bool]] = [], []
    for episode in (e for lesson in lessons for e in lesson.episodes):
        outcomes = failures(tuple((s.action, s.observation) for s in episode.steps))
        for step, view, bad in zip(episode.steps, episode_views(episode), outcomes, strict=True):
            texts[step.model > 0].append(_recent(view))
            failed[step.model > 0].append(bad)
    small, large = (_fit(LogisticRegression(C=1.0, max_iter=500), t, f) for t, f in zip(texts, failed, strict=True))
    return OneStep(small, large, margin)


def _tasks(lessons: Sequence[Lesson]) -> tuple[list[str], list[bool]]:
    return [" ".join(le.text.split()) for le in lessons], [le.difficulty is Difficulty.HARD for le in lessons]


def _fit(classifier: Any, texts: Sequence[str], labels: Sequence[bool]) -> Any:
    """A classifier of texts by their words and pairs of words; a constant where all labels are the same."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    if len(set(labels)) < 2:
        classifier = DummyClassifier(strategy="prior")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=20_000, token_pattern=r"\S+")
    return make_pipeline(words, classifier).fit(list(texts), list(labels))


def _p_true(model: Any, text: str) -> float:
    """Probability of the label True, 0 where no training label was."""
    by_class = dict(zip(model.classes_.tolist(), model.predict_proba([text])[0].tolist(), strict=True))
    return float(by_class.get(True, 0.0))


def _recent(view: str) -> str:
    """Of what the router sees: the task and the newest steps."""
    seen = read_view(view)
    return " ".join([seen.task, *(f"> {action} | {said}" for action, said in seen.history[-RECENT:])])
