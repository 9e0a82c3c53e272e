"""Names of the released scripts' numbers, and this project's names for the same."""

SCORES = {
    "Cn": "compatibility",
    "Dlearn": "teachability",
    "Dincompat": "incompatible",
    "Dn": "divergence",
    "TIP": "tip",
    "H_plus_teach": "teachability_entropy",
}
TERMS = SCORES | {
    "Hn": "entropy",
    "Hn_x_Dn": "entropy_x_divergence",
    "pos_norm": "position",
    "Htn": "teacher_entropy",
}
PROXIES = {
    "Cmass_true": "compatibility",
    "CBC": "bhattacharyya",
    "Coverlap": "topk_overlap",
    "shared_teacher_topk_mass": "shared_teacher_mass",
    "shared_student_topk_mass": "shared_student_mass",
    "topk_overlap_frac": "topk_overlap",
    "topk_jaccard": "topk_jaccard",
    "reach_t1": "teacher_top1_in_topk",
    "target_in_student_topk": "sampled_in_topk",
    "top1_match": "top1_match",
}
DEFINED_PROXIES = {
    name: PROXIES[name]
    for name in ("Cmass_true", "CBC", "Coverlap", "reach_t1", "target_in_student_topk")
}
"""Proxies of the support definitions at every K."""
LISTED_PROXIES = {
    "topk_jaccard": "topk_jaccard",
    "topk_overlap_frac": "topk_overlap",
    "shared_teacher_topk_mass": "compatibility_intersection",
    "shared_student_topk_mass": "shared_student_mass",
}
"""Proxies that follow from the lists of both models, at the K of the lists alone."""
MASKS = {
    "ca_softor": "teachability_entropy",
    "compatibility": "compatibility",
    "dincompat_high": "incompatible",
    "divergence": "divergence",
    "dlearn_high": "teachability",
    "entropy": "entropy",
    "q3": "q3",
    "q3_dincompat_high": "q3_incompatible",
    "q3_highc": "q3_compatibility",
    "q3_lowc": "q3_compatibility_low",
    "q3_teachability_high": "q3_teachability",
    "q3_teachability_low": "q3_teachability_low",
    "random": "random",
    "split_budget_ca": "split_budget",
    "tip": "tip",
}
SELECTORS = {
    "dlearn_high": "teachability",
    "divergence": "divergence",
    "tip_softor": "tip",
    "ca_softor": "teachability_entropy",
    "entropy": "entropy",
    "highC": "compatibility",
    "dincompat_high": "incompatible",
    "q3_highC": "q3_compatibility",
    "q3_dlearn": "q3_teachability_first",
    "q3_divergence": "q3_divergence",
    "random": "random",
}
BANK_SCORES = {
    "H_norm": "entropy",
    "D_norm": "divergence",
    "C_norm": "compatibility",
    "DC_norm": "weighted_divergence",
    "Dlearn": "teachability",
    "Dincompat": "incompatible",
    "tip_score": "tip",
    "ca_softor_score": "teachability_entropy",
    "split_ca_score": "split",
}
REGIONS = {"all": "all", "Q3": "Q3_lowH_highD"}
MODELS = {
    "interaction": "H_D_interaction",
    "compatibility": "H_D_C",
    "decomposition": "teach_decomp",
}
OUTCOMES = {0.0: "G_KLf", 0.01: "G_KLf_winsor01", 0.05: "G_KLf_winsor05"}
QUARTILES = ("Q1 low", "Q2", "Q3", "Q4 high")

BUCKET = {
    "positions": "tokens",
    "score_mean": "score_mean",
    "mean": "G_mean",
    "median": "G_median",
    "trimmed_mean": "G_trimmed_mean_5_95",
    "winsorized_mean": "G_winsor_mean_1_99",
}
ROBUST = {
    "positions": "tokens",
    "contexts": "contexts",
    "mean": "raw_mean",
    "median": "median",
    "trimmed_mean": "trimmed_mean_5_95",
    "winsorized_mean_1": "winsor_mean_1_99",
    "winsorized_mean_5": "winsor_mean_5_95",
    "low": "q05",
    "high": "q95",
}
RESIDUAL = {
    "positions": "tokens",
    "score_mean": "score_mean",
    "residual_mean": "residual_mean",
    "residual_median": "residual_median",
}
SUPPORT = {
    "positions": "tokens",
    "proxy_mean": "proxy_mean",
    "proxy_sd": "proxy_std",
    "gap": "mean_diff",
    "low": "ci_low",
    "high": "ci_high",
    "pairs": "matching_pairs",
    "matched_mean": "matching_mean_diff",
    "matched_median": "matching_median_diff",
}
DEFINITION = {
    "proxy_mean": "support_mean",
    "proxy_sd": "support_std",
    "r_squared": "r2_HD",
    "r_squared_gained": "delta_r2_vs_HD",
    "teachability": "beta_Dlearn",
    "incompatible": "beta_Dincompat",
    "gap": "q3_high_minus_low_mean_gain",
    "low": "q3_high_minus_low_ci_low",
    "high": "q3_high_minus_low_ci_high",
    "top": "q3_high_tokens",
    "bottom": "q3_low_tokens",
}
TOP_MEANS = {
    "mean": "mean_G",
    "q3_share": "selected_q3_frac",
    "entropy": "selected_mean_Hn",
    "divergence": "selected_mean_Dn",
    "compatibility": "selected_mean_Cn",
}
TOP = TOP_MEANS | {
    "positions": "n_keep",
    "per_kept_share": "gain_per_keep_ratio",
    "low": "ci_low",
    "high": "ci_high",
}
QUARTILE_BUCKET = {
    "positions": "tokens",
    "mean": "mean_G",
    "low": "ci_low",
    "high": "ci_high",
}
QUARTILE_GAP = {
    "bottom": "low_tokens",
    "top": "high_tokens",
    "bottom_mean": "mean_low",
    "top_mean": "mean_high",
    "gap": "high_minus_low",
    "low": "ci_low",
    "high": "ci_high",
}
TRAINING = {
    "gap": "bootstrap_mean_diff",
    "low": "bootstrap_ci_low",
    "high": "bootstrap_ci_high",
    "pairs": "matching_pairs",
    "matched": "matching_mean_diff",
    "matched_median": "matching_median_diff",
    "mean_gain": "mean_G_KLf",
    "kept_share": "keep_ratio",
    "gap_per_kept_share": "gain_per_keep",
    "q3_share": "selected_q3_frac",
    "mean_teachability": "selected_mean_Dlearn",
    "mean_incompatible": "selected_mean_Dincompat",
    "mean_compatibility": "selected_mean_C_norm",
}
OVER_SEEDS = {
    ("gap", "mean"): "bootstrap_mean",
    ("gap", "sd"): "bootstrap_std",
    ("matched", "mean"): "matching_mean",
    ("gap_per_kept_share", "mean"): "gain_per_keep_mean",
}
REACH = {
    "positions": "q3_rows",
    "reach_rate": "target_rate",
    "auc_base": "auc_hd",
    "auc": "auc_hdc",
    "auc_gained": "delta_auc",
    "brier_base": "brier_hd",
    "brier": "brier_hdc",
    "reach_low": "reach_low",
    "reach_mid": "reach_mid",
    "reach_high": "reach_high",
}
