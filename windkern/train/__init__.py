"""Train by WIND and other losses: prompts, samplers, judges, models, outer loop, evaluation and reports."""
