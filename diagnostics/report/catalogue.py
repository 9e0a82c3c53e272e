"""What each table of a run holds, in the order of the page.

This is the only place where tables are described: the page takes its captions from here.
"""

from __future__ import annotations

from diagnostics.analysis.paper.printed import PRINTED

TABLES = {
    "atlas_pooled": "Each conclusion over all pairs: mean, heterogeneity, range for a new pair.",
    "atlas_effects": "Each pair's estimate of each conclusion.",
    "decision": "Each criterion and budget over a horizon, against random, full and fair rivals.",
    "claim_statistics": "What the claims were tested on, with their strata, overlap and proxies.",
    "verdicts": "Each claim: the paper's statistic and the controlled one, and what follows.",
    "warnings": "Where a conclusion would rest on too little, one line per cause.",
    "correlations": (
        "Correlation of each criterion with the gain, with that of a permuted teacher, and with"
        " their difference."
    ),
    "placebo": "How large a change of this size is in no direction: the step's own beside it.",
    "strata": "Gain, null and linearity by stratum of the divergence.",
    "null_share": "Share of the gain that a permuted teacher gives too, by quadrant and null.",
    "horizon": "Drop of the divergences over a short trajectory with loss on all positions.",
    "differences": "Paired differences between two criteria's correlations.",
    "partial": "Correlations given entropy, divergence and position.",
    "quadrants": "Mean, median, trimmed and winsorised gain in each quadrant.",
    "positions": "Mean gain along the response.",
    "q3_contrast": "Within Q3: mean gain of the top group minus that of the bottom group.",
    "q3_groups": "Within Q3: mean gain of each third.",
    "matching": "Within Q3: the contrast between matched positions of one prompt, by caliper.",
    "balance": "What was matched on, before and after, in standard deviations.",
    "regressions": "Standardised coefficients of three models, with cluster-robust intervals.",
    "decomposition": "Difference of the coefficients of compatible and incompatible divergence.",
    "residual_curves": "Residual gain along each score.",
    "support_robustness": "The claims' statistics for each proxy and K.",
    "gain_robustness": "The claims' statistics under other forms of the gain.",
    "selection_curves": "Share of the gain captured at each budget.",
    "selection_summary": "Normalised area and enrichment.",
    "selection_overlap": "Jaccard index and rank correlation between criteria.",
    "selection_profile": "What each criterion selects.",
    "by_correctness": "Each criterion by right and by wrong responses: what it selects and gains.",
    "intervention": "Steps with loss on a selection alone; drops in nats per position.",
    "offline_agreement": "Kendall's tau between the answers.",
    "offline_answers": "Value and rank of each criterion by every answer.",
    "linearity": "Realised against first-order gain by step size.",
    "kernel_shares": "Sources of the first-order gain by group.",
    "kernel": "Sources of the first-order gain at each sampled position.",
    "lift": "What each group's losses do for held-out prompts.",
    "foresight_signs": "Difference to random on the frozen bank against the one after training.",
    "validation_verdicts": "Claim C5 against each rival, and overall.",
    "validation_outcomes": "Every measure of every training, over seeds and prompts.",
    "validation_agreement": "Kendall's tau between predicted and trained gains.",
    "validation_foreseen": "What every offline answer predicted of each training.",
    "validation_cells": "Every single training.",
    "evaluations": "The student on held-out prompts during training.",
    "training_metrics": "What training logged at each step.",
    "teachers": "Mean of each measure with each teacher, by domain and place.",
    "teachers_differences": "One teacher minus another at the same positions.",
    "teachers_best": "Share of positions where a teacher offers the most that can be followed.",
    "teachers_agreement": "How far teachers agree: ranks, likeliest tokens, selections.",
    "training_positions": "What each step saw and selected, by tenth of the responses.",
    "engine_check": (
        "Log-probabilities that came with the bank minus those of the re-score, by group and place."
    ),
    "engine_causes": "What may explain that gap: what each cause takes away of it, over prompts.",
    "engine_worst": "The positions where engine and re-score differ most.",
    "stop_tokens": "What ends a response: for the student, the teacher and the chat template.",
    "saturation": "Quantiles of every measurement and the share that is clipped.",
    "coverage": "Prompts, positions and what clustering leaves of them.",
    "calibration": "Every step size that was tried; drops in nats per position of the step's loss.",
    "left_out": "Parts that the columns did not allow.",
    "exactness": (
        "Which measurements are lower bounds with a teacher that is known by top-K lists alone."
    ),
}
"""What each table holds, in the order of the page; others follow by name."""

EARLIER = {
    "placebo_excess": (
        "Of an earlier version: correlations minus those of one random direction, which turn over"
        " with its sign. Nothing follows from them."
    ),
    "within_prompt": "Of an earlier version: mean over prompts of the correlation within each.",
    "matching_caliper": "Of an earlier version: matching with no pair beyond the caliper.",
    "balance_caliper": "Of an earlier version: what those pairs were matched on.",
}
"""Tables that earlier versions wrote; they stand last."""


PAPER = {
    f"paper_{name.lower().replace(' ', '_')}": (
        f"The paper's {name.lower()}, as released and controlled: {each.title}."
    )
    for name, each in PRINTED.items()
} | {"paper_differences": "Why the paper's numbers differ as released and controlled."}
"""Tables of the paper, which have a page of their own."""


def caption(name: str) -> str:
    """What a table holds; empty for one of the user's own."""
    return (TABLES | EARLIER | PAPER).get(name, "")
