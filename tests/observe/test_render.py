"""A report as a terminal shows it."""

from html import unescape

from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Counters
from tests.observe.simulate import ON, S, Times, pipelined, printed, stock


def test_a_report_is_printed() -> None:
    report = analyse(
        pipelined(40, Times({S.FETCH: 12, S.H2D: 1, S.LAUNCH: 1, S.DEVICE: 4, S.COPY_OUT: 1})),
        config=ON,
        counters=Counters(captures=1, replays=37, padded_elements=4, real_elements=3, verified=2),
        measured_on="emulated HPU",
    )
    text = printed(report)
    for part in (
        "input-bound (high)",
        "40 batches",
        "measured on emulated HPU",
        "1 captures, 37 replays",
        "25% of the inputs",
        "2 verified",
        "GB/s",
        "Next: Raise `num_workers`",
    ):
        assert part in text, part


def test_a_notebook_shows_the_same_panel() -> None:
    report = analyse(stock(4, Times({S.DEVICE: 5})), measured_on="<b>x & y</b>")
    html = report._repr_html_()
    assert html.startswith("<pre")
    assert html.rstrip().endswith("</pre>")
    assert report.advice.split(".")[0] in unescape(html)
    assert "<b>" not in html
    assert "&lt;b&gt;x &amp; y" in html


def test_the_name_of_a_foreign_device_is_no_markup() -> None:
    report = analyse(stock(4, Times({S.DEVICE: 5})), measured_on="[/x]")
    assert "measured on [/x]" in printed(report)
