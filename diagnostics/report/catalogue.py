"""What each table of a run holds, in the order of the page."""

from __future__ import annotations

TABLES = {
    "verdicts": "Each claim against its interval, for both gains.",
    "warnings": "Where a conclusion would rest on too little.",
    "correlations": (
        "Correlation of each gain with each criterion; estimate with interval, placebo beside it."
    ),
    "placebo_excess": "The same minus the placebo's, paired.",
    "differences": "Paired differences between two criteria's correlations.",
    "partial": "Correlations given entropy, divergence and position.",
    "within_prompt": "Mean of the correlations within a prompt.",
    "quadrants": "Mean, median, trimmed and winsorised gain in each quadrant.",
    "positions": "Mean gain along the response.",
    "q3_contrast": "Within Q3: mean gain of the top group minus that of the bottom group.",
    "q3_groups": "Within Q3: mean gain of each third.",
    "matching": "Within Q3: the contrast between matched positions of one prompt.",
    "balance": "What was matched on, before and after, in standard deviations.",
    "matching_caliper": "The same with no pair further apart than the caliper.",
    "balance_caliper": "What those pairs were matched on, before and after.",
    "regressions": "Standardised coefficients of three models, cluster-robust.",
    "decomposition": "Difference of the coefficients of compatible and incompatible divergence.",
    "residual_curves": "Residual gain along each score.",
    "support_robustness": "The claims' statistics for each proxy and K.",
    "gain_robustness": "The claims' statistics under other forms of the gain.",
    "selection_curves": "Share of the gain captured at each budget.",
    "selection_summary": "Normalised area and enrichment.",
    "selection_overlap": "Jaccard index and rank correlation between criteria.",
    "selection_profile": "What each criterion selects.",
    "intervention": "One step a criterion and budget; drops in nats a position.",
    "offline_agreement": "Kendall's tau between the answers.",
    "offline_answers": "Value and rank of each criterion by every answer.",
    "linearity": "Realised against first-order gain by step size.",
    "kernel_shares": "Sources of the first-order gain by group.",
    "kernel": "Sources of the first-order gain at each sampled position.",
    "lift": "What each group's losses do for held-out prompts.",
    "validation_verdicts": "Claim C5 against each rival, and overall.",
    "validation_outcomes": "Every measure of every training, over seeds and prompts.",
    "validation_agreement": "Kendall's tau between what was foreseen and what was trained.",
    "validation_foreseen": "What was foreseen of each training, by every answer.",
    "validation_cells": "Every single training.",
    "evaluations": "The student on held-out prompts during training.",
    "training_metrics": "What training logged at each step.",
    "saturation": "Quantiles of every measurement and how much is clipped.",
    "coverage": "Prompts, positions and what clustering leaves of them.",
    "calibration": "Every step size that was tried; drops in nats a position of the step's loss.",
    "left_out": "What the columns did not allow.",
    "exactness": (
        "What each measurement is worth with a teacher that is known by top-K lists alone."
    ),
}
"""What each table holds, in the order of the page; others follow by name."""
