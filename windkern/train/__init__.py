"""The parts of a WIND training run: prompts, sampler, judge, models, loop, evaluation, report."""
