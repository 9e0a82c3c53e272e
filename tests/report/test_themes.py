"""Style sheets of two themes, for browsers without `light-dark()`."""

from diagnostics.report import page, themes, tokenview


def test_a_rule_with_two_colors_becomes_rules_that_older_browsers_read():
    sheet = ".a { color: light-dark(#111111, #eeeeee); margin: 0; }\np { margin: 1px; }"
    lines = themes.themed(sheet).strip().splitlines()
    assert lines == [
        ".a { color: #111111; margin: 0; }",
        "@media screen and (prefers-color-scheme: dark)"
        ' { :where(:root:not([data-theme="light"])) .a { color: #eeeeee } }',
        '@media screen { :root[data-theme="dark"] .a { color: #eeeeee } }',
        '@media screen { [data-jp-theme-light="false"] .a { color: #eeeeee }'
        ' [data-jp-theme-light="true"] .a { color: #111111 } }',
        "p { margin: 1px; }",
    ]


def test_the_root_s_colors_follow_the_system_and_the_switch_alone():
    text = themes.themed(
        ":root {\n  color-scheme: light dark;\n  --ink: light-dark(#000, #fff);\n}"
    )
    assert 'prefers-color-scheme: dark) { :root:not([data-theme="light"]) { --ink: #fff } }' in text
    assert ':root[data-theme="dark"] { --ink: #fff }' in text
    assert "jp-theme" not in text and "--ink: #000" in text


def test_no_page_relies_on_light_dark():
    raw = (page.STATIC / "report.css").read_text(encoding="utf-8")
    assert "light-dark(" in raw
    assert "light-dark(" not in page.shell("a", "", "b", [], tokens=True)
    assert "light-dark(" not in tokenview.style()
