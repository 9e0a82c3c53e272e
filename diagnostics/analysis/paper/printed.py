"""The values that the paper prints, with their settings; for captions, never to be plotted.

They were measured with other models on other prompts, so that none of them is a value of the run
that a page is about. `comparable` says whether the statistic, as released, is the one that the
tables here call released; where it is not, no caption shows the value.

Reference: arXiv 2605.26844, section 3 and appendices. Pairs are Qwen3 models, teacher first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """What the paper prints for one artefact."""

    title: str
    """What the artefact shows."""
    values: str = ""
    """Its numbers; empty where none is printed."""
    setting: str = ""
    """Pair, data and statistic that the numbers belong to."""
    comparable: bool = False
    """Whether the released scripts make these numbers by a definition that is known."""
    note: str = ""
    """What is not known of the definition."""

    @property
    def text(self) -> str:
        """Values with their setting, for a caption; empty where they are not comparable."""
        return f"{self.values} ({self.setting})" if self.comparable and self.values else ""


_BANK = "300 contexts, 57,600 positions per setting"
_GAPS = (
    "4B to 1.7B held-out maths .078 [.060, .095], matched .016; GSM8K .087 [.066, .109], .037; 8B"
    " to 1.7B .118 [.094, .144], .042; 14B to 1.7B at K = 8 .098 [.080, .117], .071; K = 16 .084"
    " [.069, .098], .058; K = 32 .078 [.062, .095], .046"
)
_MASKS = (
    "D^L high .015 ± .010, matched .010; D^L low −.010 ± .015, −.006; D^I high .006 ± .003, −.003"
)
_COEFFICIENTS = "D^L .086, .087, .087 and D^I .045, .043, .043 at K = 8, 16, 32"
_PROXIES = (
    "K = 16: mass .086, Bhattacharyya .105, Jaccard and overlap .038; K = 32: .090, .105, .052,"
    " .052"
)
_TOP = (
    "at 3 and 5 %: teachability .130, .135; divergence .120, .119; TIP .093, .094; entropy .076,"
    " .066; random −.130, −.105; incompatible .105, .111"
)
_GAP_SETTING = f"relative gain, Q3 by the trained student's entropy; {_BANK}"
_TRAINED = "Q3 gap of the relative gain after training, printed as G"

PRINTED: dict[str, Printed] = {
    "Figure 2A": Printed(
        "Mean gain over compatible and incompatible divergence",
        note="No code for it was released; its number of bins and the scale of its gain (the bar"
        " runs from −4 to 4) are unknown.",
    ),
    "Figure 2B": Printed("Where compatible divergence lies", note="No code for it was released."),
    "Figure 2C": Printed("Where incompatible divergence lies", note="No code for it was released."),
    "Figure 3A": Printed(
        "Coefficients of compatible and incompatible divergence",
        _COEFFICIENTS,
        "standardized, of the raw relative gain; 14B to 1.7B",
        True,
    ),
    "Figure 3B": Printed(
        "Training on masks inside Q3", _MASKS, f"{_TRAINED}; mean ± SD over seeds", True
    ),
    "Figure 3C": Printed("The Q3 gap", _GAPS, _GAP_SETTING, True),
    "Figure 4A": Printed(
        "Mean gain of the exact top N",
        _TOP,
        "relative gain winsorized by 1 %; C of the trained student",
        True,
    ),
    "Figure 4B": Printed("Gain per share kept"),
    "Figure 4C": Printed(
        "The Q3 gap by support proxy",
        _PROXIES,
        "relative gain, predictors before training; 14B to 1.7B, 3,342 positions of Q3",
        True,
    ),
    "Figure 4D": Printed(
        "Gain by quarters of each score inside Q3",
        note="It shows a shift against a reference that is not stated.",
    ),
    "Figure 5A": Printed(
        "Robustness of the Q3 gap",
        "interval widths .036, .042, .050, .037, .029, .033",
        f"settings in the order of table 1; {_GAP_SETTING}",
        True,
    ),
    "Figure 5B": Printed(
        "Support proxies over K",
        _PROXIES,
        "relative gain, predictors before training; 14B to 1.7B",
        True,
    ),
    "Figure 5C": Printed(
        "Trimmed gain by quarters of each score inside Q3",
        note="It prints no numbers.",
    ),
    "Table 1": Printed("The Q3 gap", _GAPS, _GAP_SETTING, True),
    "Table 2": Printed(
        "Trainings under each mask",
        "at 3 %: teachability .047, divergence .033, incompatible .025, TIP .023, random .021,"
        " TA+entropy .021, entropy .018, Q3 + high C .016, Q3 + low C .010, Q3 only .010; at 5 %:"
        " teachability .049, divergence .036, TIP .026, random .021, TA+entropy .016, entropy .009,"
        " Q3 + high C .009, Q3 only .002",
        f"{_TRAINED}; it is no mean reduction",
        True,
    ),
    "Table 5": Printed(
        "How much the numbers rest on",
        "300 contexts and 57,600 positions for five of six settings",
        "the paper's own banks",
    ),
    "Table 6": Printed(
        "Support proxies inside Q3",
        _PROXIES,
        "relative gain, predictors before training; 14B to 1.7B, 3,342 positions of Q3",
        True,
    ),
    "Table 7": Printed(
        "Training on masks inside Q3", _MASKS, f"{_TRAINED}; mean ± SD over seeds", True
    ),
    "Table 8": Printed(
        "Exact top N of each selector",
        _TOP,
        "relative gain winsorized by 1 %; C of the trained student",
        True,
    ),
    "Table 9": Printed(
        "Regression on compatible and incompatible divergence",
        f"{_COEFFICIENTS}; gap .041, .044, .044",
        "standardized, of the raw relative gain; 14B to 1.7B",
        True,
        "No code was released for its intervals and its gains of R² (.90, .79, .74 × 10⁻³).",
    ),
    "Table 10": Printed(
        "Teachability over budgets",
        "at 1, 3, 5 and 10 %: .034, .047, .049, .035; matched .017, .030, .027, .022",
        f"{_TRAINED}; three seeds",
        True,
    ),
}
"""Every artefact that can be made from a token bank and short trainings, by the paper's name."""


def printed(artefact: str) -> Printed:
    """What the paper prints for an artefact, such as `Table 1`."""
    return PRINTED[artefact]
