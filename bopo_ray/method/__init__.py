"""The paper, in its order: taxonomy, synthesis, reward, advantage, loss, budget. Pure functions; torch in `loss`."""
