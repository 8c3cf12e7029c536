"""The report's charts as Vega-Lite specifications (dicts), built and checked by Altair."""

from typing import Any

import altair as alt
import pandas as pd

COLORS = ["#6b7280", "#dc2626", "#f59e0b", "#2563eb", "#7c3aed", "#0d9488", "#db2777", "#65a30d", "#0891b2",
          "#92400e"]  # by position in corpus.labels, repeated when there are more
LINES = {
    "waf_best_epoch": "cross-validated, best epoch",
    "waf_last_epoch": "cross-validated, last epoch",
    "test_waf": "test",
}


def confusion_chart(table: pd.DataFrame, labels: list[str]) -> dict[str, Any]:
    """Heat map of actual against predicted, coloured by the share of the actual class, with the counts on it."""
    counts = pd.crosstab(table["actual"], table["predicted"]).reindex(index=labels, columns=labels, fill_value=0)
    cells = counts.rename_axis("actual").reset_index().melt("actual", var_name="predicted", value_name="clips")
    totals = cells.groupby("actual")["clips"].transform("sum").clip(lower=1)
    cells["share"] = (cells["clips"] / totals).round(4)
    base = alt.Chart(cells).encode(
        x=alt.X("predicted:N", sort=labels, title="predicted", axis=alt.Axis(labelAngle=0, orient="top")),
        y=alt.Y("actual:N", sort=labels, title="actual"),
        tooltip=["actual:N", "predicted:N", "clips:Q", alt.Tooltip("share:Q", format=".1%", title="share of actual")],
    )
    scale = alt.Scale(scheme="blues", domain=[0, 1])
    squares = base.mark_rect(stroke="#fff").encode(color=alt.Color("share:Q", scale=scale, legend=None))
    white = alt.condition("datum.share > 0.55", alt.value("#fff"), alt.value("#1f2937"))
    text = base.mark_text(fontSize=13).encode(text="clips:Q", color=white)
    return _finish((squares + text).properties(width=alt.Step(84), height=alt.Step(42)))


def rounds_chart(table: pd.DataFrame) -> dict[str, Any]:
    """WAF by self-training round, and beside it the accuracy of the pseudo-labels that each round added."""
    lines = _long(table, "round", LINES)
    charts = [_lines(lines, "round", "WAF (%)")]
    if "pseudo_label_accuracy" in table and table["pseudo_label_accuracy"].notna().any():
        accuracy = _long(table, "round", {"pseudo_label_accuracy": "pseudo-labels added in the round"})
        charts.append(_lines(accuracy, "round", "accuracy (%)"))
    return _finish(alt.hconcat(*charts).resolve_scale(color="independent"))


def curves_chart(table: pd.DataFrame) -> dict[str, Any]:
    """Training curves before self-training: losses, and beside them the validation WAF."""
    losses = _long(table, "epoch", {"train_loss": "training", "valid_loss": "validation"})
    waf = _long(table, "epoch", {"valid_waf": "validation"})
    left, right = _lines(losses, "epoch", "cross-entropy"), _lines(waf, "epoch", "WAF (%)")
    return _finish(alt.hconcat(left, right).resolve_scale(color="independent"))


def reliability_chart(table: pd.DataFrame) -> dict[str, Any]:
    """Accuracy against confidence by bin, a line per value of the column `line`; points as large as bins have clips."""
    percent = alt.Scale(domain=[0, 100])
    diagonal = alt.Chart(pd.DataFrame({"confidence": [0, 100], "accuracy": [0, 100]})).mark_line(
        color="#d1d5db").encode(x=alt.X("confidence:Q", scale=percent, title="mean probability of the label (%)"),
                                y=alt.Y("accuracy:Q", scale=percent, title="of these are right (%)"))
    base = alt.Chart(table.round({"confidence": 2, "accuracy": 2})).encode(
        x="confidence:Q", y="accuracy:Q", tooltip=["line:N", "confidence:Q", "accuracy:Q", "clips:Q"],
        color=alt.Color("line:N", title=None, sort=None, legend=alt.Legend(orient="bottom", labelLimit=300)))
    points = base.mark_circle(opacity=0.8).encode(size=alt.Size("clips:Q", legend=None))
    return _finish((diagonal + base.mark_line(strokeWidth=1) + points).properties(width=360, height=300))


def robustness_chart(table: pd.DataFrame) -> dict[str, Any]:
    """Bars of WAF by what is left, with whiskers of one deviation over seeds, best first."""
    split = "test" if "test_waf" in table else "cv"
    bars = table[["removed", "kept"]].assign(waf=table[f"{split}_waf"].round(2), std=table[f"{split}_waf_std"].round(2))
    bars["low"], bars["high"] = bars["waf"] - bars["std"], bars["waf"] + bars["std"]
    bars["kept"] = bars["kept"].str.replace("+", " + ")
    order = bars.sort_values("waf", ascending=False, kind="stable")["kept"].tolist()
    base = alt.Chart(bars).encode(
        y=alt.Y("kept:N", title=None, sort=order, axis=alt.Axis(labelLimit=360)),
        tooltip=["kept:N", "removed:N", alt.Tooltip("waf:Q", title="WAF"), alt.Tooltip("std:Q", title="deviation")],
    )
    color = alt.condition("datum.removed == 'none'", alt.value("#1d4ed8"), alt.value("#93c5fd"))
    bar = base.mark_bar().encode(x=alt.X("waf:Q", title=f"WAF (%), {_full(split)}"), color=color)
    whisker = base.mark_rule(color="#1f2937").encode(x="low:Q", x2="high:Q")
    text = base.mark_text(align="left", dx=4, color="#1f2937").encode(x="high:Q", text=alt.Text("waf:Q", format=".1f"))
    return _finish((bar + whisker + text).properties(width=420, height=alt.Step(20)))


def _full(split: str) -> str:
    return {"cv": "cross-validated", "test": "test"}[split]


def _long(table: pd.DataFrame, x: str, names: dict[str, str]) -> pd.DataFrame:
    """One row per point; missing values are left out."""
    columns = [column for column in names if column in table]
    long = table[[x, *columns]].rename(columns=names).melt(x, var_name="line", value_name="value")
    return long.dropna().round({"value": 4})


def _lines(long: pd.DataFrame, x: str, title: str) -> alt.Chart:
    return alt.Chart(long).mark_line(point=True).encode(
        x=alt.X(f"{x}:Q", title=x, axis=alt.Axis(tickMinStep=1, format="d")),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("line:N", title=None, sort=None, legend=alt.Legend(orient="bottom", labelLimit=300)),
        tooltip=[f"{x}:Q", "line:N", alt.Tooltip("value:Q", format=".2f")],
    ).properties(width=360, height=240)


def _finish(chart: "alt.Chart | alt.LayerChart | alt.HConcatChart") -> dict[str, Any]:
    return chart.configure(font="system-ui, sans-serif").configure_view(stroke=None).to_dict()
