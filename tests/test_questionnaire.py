"""`python -m minti.study questionnaire`: what the page holds, and what becomes of the answers."""

import json
import re
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from PIL import Image

from minti import InputError
from minti.judge.picture_jobs import PictureStore, Protocol
from minti.study import __main__ as study
from minti.study.answers import people_table, read_answers
from minti.study.questionnaire import choose_setups, draw_questions, write_questionnaire
from minti.study.recipe import StudyPlan, make_plan
from minti.study.summary import Outcome

from .test_study import base, outcome, small_probe, write_recipe  # noqa: F401

SETUPS = ["secret one", "secret two", "secret three"]
T_OF_2 = 4.302653  # Student's t, 95 %, two degrees of freedom; from a table


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    """Two concepts, three setups, and a caption that is not asked about."""
    for name in ("toy", "cat"):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 0, len(name))).save(tmp_path / name / f"{i}.png")
    concepts = {n: {"init_word": "x", "set": "final", "images": str(tmp_path / n)} for n in ("toy", "cat")}
    setups = {name: {"seed": i} for i, name in enumerate(SETUPS)}
    recipe = {"concepts": concepts, "prompts": ["{} on <b>", "red {}"], "setups": setups}
    keys = ("title", "about", "kinds", "base", "captions", "claims")
    return make_plan(dict.fromkeys(keys) | recipe, Protocol(num_images=4), repeats=2)


@pytest.fixture
def folder(plan: StudyPlan, tmp_path: Path) -> Path:
    """The folder of a study of this plan: every picture has a colour of its own."""
    folder, store = tmp_path / "study", PictureStore(tmp_path / "study" / "pictures")
    names = {job for seed in range(30) for q in draw_questions(plan, SETUPS, 99, seed) for job in q.jobs}
    for i, name in enumerate(sorted(names)):
        pictures = [Image.new("RGB", (8, 8), (i, 50 * k, 9)) for k in range(4)]
        from minti.judge.picture_jobs import PictureJob

        store.save(PictureJob(name, {}, lambda on_step: []), {}, pictures)
    return folder


def answer(folder: Path, page: Path, name: str, order: list[str], **changes: object) -> Path:
    """A file as the page saves it: this order of the setups in every question."""
    key = json.loads(page.with_suffix(".json").read_text())
    answers = [[q["setups"].index(name) for name in order] for q in key["questions"]]
    content = {"questionnaire": page.stem, "respondent": name, "answers": answers, **changes}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def test_the_page_is_self_contained_and_tells_no_setup(folder: Path, plan: StudyPlan) -> None:
    path = write_questionnaire(folder, plan, SETUPS, count=3)
    html = path.read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "<link" not in html and 'src="/' not in html
    assert "default-src 'none'" in html and "script-src 'sha256-" in html
    sources = re.findall(r'<img[^>]* src="([^"]{0,22})', html)
    assert len(sources) == 3 * (4 + 3) + 3 * 3 and all(s.startswith("data:image/") for s in sources)
    assert "secret" not in html and "toy" not in html and "seed" not in html
    assert "… on &lt;b&gt;" in html and "<b>…" not in html
    for job in {job for q in draw_questions(plan, SETUPS, 3, 0) for job in q.jobs}:
        assert job.split("/")[0] not in html


def test_pictures_are_those_of_the_key(folder: Path, plan: StudyPlan) -> None:
    """Each picture of the page, decoded, has the colour of the picture that the key names."""
    import base64
    import io

    path = write_questionnaire(folder, plan, SETUPS, count=3)
    key, store = json.loads(path.with_suffix(".json").read_text()), PictureStore(folder / "pictures")
    shown = re.findall(r'base64,([^"]*)" width=8 height=8 alt="Picture', path.read_text(encoding="utf-8"))
    expected = [(job, q["picture"]) for q in key["questions"] for job in q["jobs"]]
    assert len(shown) == len(expected) == 18
    for data, (job, number) in zip(shown, expected, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert image.getpixel((0, 0)) == store.thumbnails(job)[number].getpixel((0, 0))


def test_order_is_a_function_of_the_seed(folder: Path, plan: StudyPlan) -> None:
    one, same, other = (draw_questions(plan, SETUPS, 4, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert {q.concept for q in one[:2]} == {"toy", "cat"} and [q.kind for q in one] == ["photos"] * 4 + [
        "text"
    ] * 4
    assert len({tuple(q.setups) for q in draw_questions(plan, SETUPS, 99, 0)}) == 6  # every order occurs
    first, again = (write_questionnaire(folder, plan, SETUPS, 2, seed=3) for _ in range(2))
    assert first == again and first.read_bytes() == again.read_bytes()
    assert write_questionnaire(folder, plan, SETUPS, 2, seed=4) != first and first.exists()


def test_setups_are_chosen(plan: StudyPlan) -> None:
    assert choose_setups(plan, []) == [*SETUPS, "prompt only"]
    assert choose_setups(plan, SETUPS[:2]) == SETUPS[:2]
    with pytest.raises(InputError, match="--setup best: no setup is called so; there are secret one, "):
        choose_setups(plan, ["best"])
    with pytest.raises(InputError, match="1 setups, where people can rank 2 to 5"):
        choose_setups(plan, SETUPS[:1])


def test_mean_ranks_by_hand(folder: Path, plan: StudyPlan, tmp_path: Path) -> None:
    """Three respondents, two questionnaires: "secret one" is first, first and second."""
    pages = [write_questionnaire(folder, plan, SETUPS, 2, seed) for seed in (0, 1, 1)]
    one, two, three = SETUPS
    orders = [[one, two, three], [one, three, two], [two, one, three]]
    for page, name, order in zip(pages, "abc", orders, strict=True):
        answer(tmp_path / "answers", page, name, order)
    people = read_answers(folder, tmp_path / "answers")
    assert people.respondents == 3 and people.setups == 3
    for kind in ("photos", "text"):
        found = people.ranks[kind]
        assert found[one].value == pytest.approx(4 / 3)
        assert found[two].value == pytest.approx(2) and found[three].value == pytest.approx(8 / 3)
        assert found[one].margin == pytest.approx(T_OF_2 * sqrt(1 / 3) / sqrt(3), rel=1e-4)
    row = replace(outcome(one, 0.5, 0.25, 0.0), concept="")
    html = people_table(people, [row, Outcome("", "", replace(row.evaluation, name="other"))])
    cells = "<td>1.33 <small>± 1.43</small></td><td>0.500 <small>± 0.010</small></td>"
    assert cells in html and "3 respondents" in html and "other" not in html


def test_answers_of_different_questions_are_averaged_within_a_respondent(
    folder: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    """One respondent has no interval, and the kinds of questions are kept apart."""
    page = write_questionnaire(folder, plan, SETUPS, 2)
    path = answer(tmp_path / "answers", page, "a", SETUPS)
    content = json.loads(path.read_text())
    content["answers"][0] = content["answers"][0][::-1]
    path.write_text(json.dumps(content))
    people = read_answers(folder, tmp_path / "answers")
    assert [people.ranks["photos"][name].value for name in SETUPS] == [2, 2, 2]
    assert [people.ranks["text"][name].value for name in SETUPS] == [1, 2, 3]
    assert people.ranks["text"][SETUPS[0]].margin is None


@pytest.mark.parametrize(
    "change, message",
    [
        ("not JSON", "bad.json: truncated or damaged"),
        ("[1]", "bad.json: should hold a JSON object"),
        ({"questionnaire": "0123"}, "bad.json: answers no questionnaire of"),
        ({"questionnaire": ["x"]}, "bad.json: answers no questionnaire of"),
        ({"respondent": 3}, "bad.json: is damaged"),
        ({"respondent": "a"}, "bad.json: is by the respondent of"),
        ({"answers": [[0, 1, 2]]}, "bad.json: is damaged (1 answers to 4 questions)"),
        ({"answers": [[0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2]]}, "bad.json: is incomplete, question 2"),
        (
            {"answers": [[0, 1, 2], [0, 1, 1], [0, 1, 2], [0, 1, 2]]},
            "bad.json: is damaged (answer 2 is no order",
        ),
        ({"answers": [[0, 1, 2], {"0": 1}, [0], [0]]}, "bad.json: is damaged (answer 2 is no list"),
        ({"answers": [[0, 1, 2], [0, 1, True], [0], [0]]}, "bad.json: is damaged (answer 2 is no list"),
    ],
)
def test_bad_answers_are_named(
    change: object, message: str, folder: Path, plan: StudyPlan, tmp_path: Path
) -> None:
    page = write_questionnaire(folder, plan, SETUPS, 2)
    answer(tmp_path / "answers", page, "a", SETUPS)
    path = answer(tmp_path / "answers", page, "bad", SETUPS, **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        path.write_text(change)
    with pytest.raises(InputError) as caught:
        read_answers(folder, tmp_path / "answers")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"setups": 3}, {"questions": [{}]}, {"questions": 2}, {"setups": ["other"]}]
)
def test_a_damaged_key_is_named(change: dict, folder: Path, plan: StudyPlan, tmp_path: Path) -> None:
    page = write_questionnaire(folder, plan, SETUPS, 2)
    answer(tmp_path / "answers", page, "a", SETUPS)
    key = page.with_suffix(".json")
    key.write_text(json.dumps(json.loads(key.read_text()) | change))
    with pytest.raises(InputError, match=r"\.json: is damaged; make the questionnaire again"):
        read_answers(folder, tmp_path / "answers")


def test_answers_about_other_setups_are_not_mixed(folder: Path, plan: StudyPlan, tmp_path: Path) -> None:
    answer(tmp_path / "answers", write_questionnaire(folder, plan, SETUPS, 2), "a", SETUPS)
    answer(tmp_path / "answers", write_questionnaire(folder, plan, SETUPS[:2], 2), "b", SETUPS[:2])
    with pytest.raises(InputError, match=r"b\.json: is about other setups than"):
        read_answers(folder, tmp_path / "answers")
    with pytest.raises(InputError, match="holds no answers"):
        read_answers(folder, tmp_path / "nowhere")


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """From a study to its questionnaire, and from answers to the report, which bad answers leave alone."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="it is no finished study"):
        study.main(["questionnaire", str(tmp_path)])
    recipe = write_recipe(base, tmp_path, setups={"1 vector": {}, "fast": {"lr": 0.1}}, claims=[])
    study.main([recipe, "--out", str(out), "--choose", "toy"])
    capsys.readouterr()
    study.main(["questionnaire", str(out), "--questions", "2"])
    page = Path(capsys.readouterr().out.strip())
    names = ["1 vector", "fast", "caption", "prompt only"]
    answer(tmp_path / "answers", page, "a", names)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "answers" / "b.json").write_text("{}")
    with pytest.raises(InputError, match=r"b\.json: answers no questionnaire"):
        study.main([str(out), "--answers", str(tmp_path / "answers")])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "answers" / "b.json").unlink()
    study.main([str(out), "--answers", str(tmp_path / "answers")])
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "What people say" in html and "<th scope=row>fast</th><td>2.00</td>" in html
    people = json.loads((out / "study.json").read_text())["people"]
    assert [people["ranks"]["text"][name]["value"] for name in names] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="--overwrite removes"):
        study.main([str(out), "--answers", str(tmp_path / "answers"), "--overwrite"])
    assert page.exists()
