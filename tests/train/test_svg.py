import re

from dist_peft.train.svg import CURVES, INK, THEME_CSS, drawing, make_figure, render_svg


def draw(title: str, name: str, *, is_file: bool = False) -> str:
    with drawing():
        figure = make_figure((2, 1))
        axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
        axes.plot([1, 2], [1, 2], color=CURVES[1], marker="o", label="$x^2$ \u4e2d")
        axes.legend(labelcolor=INK)
        return render_svg(figure, title, name, is_file=is_file)


def test_colours_are_variables_and_text_is_text() -> None:
    picture = draw('a "b" <c>', "one")
    assert picture.startswith(
        '<svg viewBox="0 0 144 72" role="img" aria-label="a &quot;b&quot; &lt;c&gt;">'
    )
    assert "$x^2$ \u4e2d</text>" in picture
    assert "var(--plot-curve-2)" in picture and CURVES[1] not in picture and INK not in picture
    assert not re.search("metadata|https?:", picture)
    assert picture == draw('a "b" <c>', "one")


def test_identifiers_are_those_of_the_picture() -> None:
    names = re.findall(r' id="([^"]*)"', draw("a", "one"))
    assert names and all(name.startswith("one-") for name in names)


def test_a_file_defines_its_colours() -> None:
    picture = draw("a", "one", is_file=True)
    assert THEME_CSS in picture and 'xmlns="http://www.w3.org/2000/svg"' in picture
