from dist_peft.train.report_page import ComparisonTable, Picture, render_page


def test_parts_without_content_are_left_out_and_text_is_escaped() -> None:
    page = render_page("<n>", headline="h&h", tables=[("Empty", ())])
    assert "<h1>&lt;n&gt;</h1>" in page and "h&amp;h" in page
    assert "<h2>" not in page and "<figure" not in page and "<details>" not in page


def test_pictures_have_a_side_for_phones() -> None:
    pictures = [Picture("<svg>1</svg>", "<svg>2</svg>"), Picture("<svg>3</svg>")]
    page = render_page("n", headline="", pictures=pictures)
    assert page.count('<figure class="wide">') == page.count('<figure class="narrow">') == 1
    assert "<figure>\n<svg>3</svg></figure>" in page


def test_comparisons_have_a_column_for_each_run() -> None:
    table = ComparisonTable("T", ["<a>", "b"], [("Steps", ["494 MiB", "<2> " * 4])])
    page = render_page("n", headline="", comparisons=[table])
    assert '<th scope="col">&lt;a&gt;</th><th scope="col">b</th>' in page
    short, long = '<td class="short">494 MiB</td>', f"<td>{'&lt;2&gt; ' * 4}</td>"
    assert f'<th scope="row">Steps</th>\n{short}\n{long}\n' in page
