"""Language models behind one protocol, and what they cost."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bopo_ray.models.pool import ModelSpec, PoolSpec, resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.models.protocol import LanguageModel, ModelPool

__all__ = ["build_pool", "host_pool", "load_pool"]


def load_pool(models: str = "simulated", small: str = "", large: str = "", prices: str = "") -> ModelPool:
    """The pool that `resolve_pool` finds with the shipped prices, or those of the file `prices`, ready to answer.

    Raises ConfigError.
    """
    return build_pool(resolve_pool(models, small, large, price_table(Path(prices)) if prices else price_table()))


@cache
def build_pool(spec: PoolSpec, processes: int = 1) -> ModelPool:
    """The models of `spec`, once per process; `processes` of them share each endpoint's limits."""
    providers = {m.provider for m in spec.models}
    names = " / ".join(m.label for m in spec.models)
    if providers == {"simulated"}:
        from bopo_ray.models.simulated import STANDS_FOR

        label = "simulated"
        billed = " / ".join(STANDS_FOR.get(m.target, m.label) for m in spec.models)
        note = (
            "Simulated executors that follow the environment's expert plan and err by design; "
            f"tokens are counted and billed at the list prices of {billed} of {spec.prices_date}."
        )
    elif providers == {"embedded"}:
        label = "self-trained"
        note = (
            "Language models of our own, trained from scratch by this project "
            f"({', '.join(f'embedded:{m.label}' for m in spec.models)}); tokens are measured; billed at the list "
            f"prices of GPT-4.1-mini / GPT-4.1 of {spec.prices_date}, which are nominal."
        )
    else:
        label = names
        note = f"Language models {names}; tokens as reported, billed at the prices of {spec.prices_date}."
    local = sum(m.provider == "hf" for m in spec.models)
    models = tuple(_build(m, processes, local) for m in spec.models)
    return ModelPool(models, label, spec.note or note, spec.price_hash)


def host_pool(spec: PoolSpec) -> None:
    """Starts the actors of local models, which then last as long as this process is connected to Ray."""
    local = [m for m in spec.models if m.provider == "hf"]
    if local:
        from bopo_ray.models.huggingface import host

        for m in local:
            host(m, len(local))


def _build(spec: ModelSpec, processes: int, local: int) -> LanguageModel:
    """Imports a provider when it is used: transformers take seconds. `local` hf models share the GPUs."""
    if spec.provider == "openai":
        from bopo_ray.models.openai_http import OpenAIModel

        return OpenAIModel(spec, processes)
    if spec.provider == "hf":
        from bopo_ray.models.huggingface import shared_hf_model

        return shared_hf_model(spec, local)
    if spec.provider == "embedded":
        from bopo_ray.models.embedded import EmbeddedModel

        return EmbeddedModel(spec)
    from bopo_ray.models.simulated import SimulatedModel

    return SimulatedModel(spec)
