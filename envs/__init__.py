"""The benchmarks, as Gymnasium environments with text observations and text actions."""
