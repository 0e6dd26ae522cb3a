"""Scores equal the official scripts: on stored slices (POPE, TextVQA), and on cases worked by hand from their rules."""

import json
from pathlib import Path

import pytest

from student_train.scores import (
    hallucination,
    score_gqa,
    score_mmbench,
    score_mme,
    score_pope,
    score_science_qa,
    score_textvqa,
    vqa_accuracy,
    write_mmbench_submission,
    yes_no_scores,
)
from student_train.scores.mmbench import can_infer
from student_train.scores.mme import COGNITION, PERCEPTION, yes_no_or_other
from student_train.scores.science_qa import parse_letter
from student_train.scores.textvqa import normalise, soft_accuracy
from student_train.scores.yes_no import says_yes

DATA = Path(__file__).parent / "data"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestBuiltIn:
    def test_vqa_accuracy_ignores_case_punctuation_and_surrounding_spaces(self):
        scores = vqa_accuracy(
            [" Red.", "2", "left", ""], ["red", "3", "left", "yes"], ["color", "count", "where", "exist"]
        )
        assert scores.overall == 0.5
        assert scores.per_type == {"color": 1.0, "count": 0.0, "exist": 0.0, "where": 1.0}

    def test_vqa_accuracy_is_over_questions_not_over_types(self):
        scores = vqa_accuracy(["a", "a", "a", "b"], ["a", "a", "a", "a"], ["x", "x", "x", "y"])
        assert (scores.overall, scores.per_type, scores.questions) == (0.75, {"x": 1.0, "y": 0.0}, {"x": 3, "y": 1})

    def test_sequences_of_different_length_are_refused(self):
        with pytest.raises(ValueError, match="2 predictions, 1 references, 1 question_types; expected as many of each"):
            vqa_accuracy(["a", "b"], ["a"], ["x"])
        with pytest.raises(ValueError, match="0 answers, 0 labels; expected as many of each, and at least one"):
            yes_no_scores([], [])

    def test_yes_no_scores_by_hand(self):
        scores = yes_no_scores(["yes", "Yes, it is", "no", "No.", "yes"], ["yes", "no", "no", "yes", "yes"])
        assert (scores.true_positives, scores.false_positives) == (2, 1)
        assert (scores.true_negatives, scores.false_negatives) == (1, 1)
        assert (scores.accuracy, scores.yes_ratio) == (0.6, 0.6)
        assert scores.precision == scores.recall == pytest.approx(2 / 3)
        assert scores.f1 == pytest.approx(2 / 3)

    def test_a_model_that_never_says_yes_scores_zero_and_does_not_divide_by_zero(self):
        scores = yes_no_scores(["no", "no"], ["yes", "no"])
        assert (scores.precision, scores.recall, scores.f1, scores.yes_ratio) == (0.0, 0.0, 0.0, 0.0)

    def test_other_labels_are_refused(self):
        with pytest.raises(ValueError, match="'maybe' at 1; expected 'yes' or 'no'"):
            yes_no_scores(["yes", "yes"], ["no", "maybe"])

    @pytest.mark.parametrize(
        ("text", "yes"),
        [
            ("No, there is no car.", False),
            ("There is not any.", False),
            ("Yes. There is no doubt", True),  # only the first sentence counts
            ("nope", True),  # three words are known: No, no, not
            ("NO", True),
            ("", True),
            ("it is not,", False),  # commas go first
            ("no\nwell", True),  # words are split at spaces, not at line ends
        ],
    )
    def test_pope_reads_yes_and_no_as_published(self, text, yes):
        assert says_yes(text) is yes

    def test_hallucination_by_hand(self):
        scores = hallucination([["cat", "Dog", "cat"], ["cup"], []], [["dog"], ["cup", "pen"], ["sofa"]])
        assert scores.precision == pytest.approx(2 / 3)  # stated: cat, dog, cup
        assert scores.recall == 0.5  # true: dog, cup, pen, sofa
        assert scores.hallucination_rate == pytest.approx(1 / 3)
        assert scores.hallucinating_answers == pytest.approx(1 / 3)

    def test_saying_nothing_hallucinates_nothing(self):
        scores = hallucination([[]], [["cat"]])
        assert (scores.recall, scores.hallucination_rate, scores.hallucinating_answers) == (0.0, 0.0, 0.0)

    def test_a_text_is_not_a_collection_of_objects(self):
        with pytest.raises(ValueError, match="expected a collection of names"):
            hallucination(["cat"], [["cat"]])


class TestPope:
    def test_slices_give_the_official_figures_exactly(self):
        folder = DATA / "pope"
        scores = score_pope(folder / "answers.jsonl", folder, folder / "questions.jsonl")
        expected = json.loads((folder / "expected.json").read_text())
        assert {name: category.as_dict() for name, category in scores.categories.items()} == expected
        assert scores.f1 == pytest.approx(sum(row["F1 score"] for row in expected.values()) / 3)
        assert scores.accuracy == pytest.approx(sum(row["Accuracy"] for row in expected.values()) / 3)

    def test_order_of_the_answer_file_does_not_matter(self, tmp_path):
        folder = DATA / "pope"
        answers = write_lines(tmp_path / "answers.jsonl", reversed(read_lines(folder / "answers.jsonl")))
        assert score_pope(answers, folder, folder / "questions.jsonl") == score_pope(
            folder / "answers.jsonl", folder, folder / "questions.jsonl"
        )

    def test_labels_of_another_category_are_refused(self, tmp_path):
        folder = DATA / "pope"
        for name in ("random", "popular"):
            (tmp_path / f"coco_pope_{name}.json").write_text((folder / f"coco_pope_{name}.json").read_text())
        (tmp_path / "coco_pope_adversarial.json").write_text((folder / "coco_pope_popular.json").read_text())
        with pytest.raises(
            ValueError, match=r"coco_pope_adversarial.json line \d+: .*; expected question \d+, .* same download"
        ):
            score_pope(folder / "answers.jsonl", tmp_path, folder / "questions.jsonl")

    def test_missing_label_file_is_named(self, tmp_path):
        folder = DATA / "pope"
        with pytest.raises(
            ValueError, match=r"coco_pope_adversarial\.json: not there; expected the labels of category"
        ):
            score_pope(folder / "answers.jsonl", tmp_path, folder / "questions.jsonl")


class TestAnswerFiles:
    """Every scorer reads answers in the same way; POPE stands for all."""

    def score(self, tmp_path, rows):
        folder = DATA / "pope"
        return score_pope(write_lines(tmp_path / "answers.jsonl", rows), folder, folder / "questions.jsonl")

    def test_missing_answer_is_named(self, tmp_path):
        rows = read_lines(DATA / "pope" / "answers.jsonl")
        with pytest.raises(
            ValueError, match=r"no answer to question '5' .*\(1 missing\); found 899 answers, expected 900"
        ):
            self.score(tmp_path, rows[:4] + rows[5:])

    def test_doubled_answer_is_named_with_both_lines(self, tmp_path):
        rows = read_lines(DATA / "pope" / "answers.jsonl")
        with pytest.raises(ValueError, match=r"line 901: question '3' is answered again \(first in line 3\)"):
            self.score(tmp_path, [*rows, rows[2]])

    def test_unknown_question_is_named(self, tmp_path):
        rows = read_lines(DATA / "pope" / "answers.jsonl")
        with pytest.raises(ValueError, match=r"question '77777' is not in .*questions.jsonl \(1 such answers\)"):
            self.score(tmp_path, [*rows, {"question_id": 77777, "text": "yes"}])

    def test_broken_line_is_named(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        path.write_text('{"question_id": 1, "text": "yes"}\n{"question_id": 2, "te', encoding="utf-8")
        with pytest.raises(ValueError, match=r"answers\.jsonl line 2: not JSON .* cut short"):
            score_pope(path, DATA / "pope", DATA / "pope" / "questions.jsonl")

    def test_missing_field_wrong_type_and_empty_file_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="line 1: no field 'text'; expected an object with question_id, text"):
            self.score(tmp_path, [{"question_id": 1, "answer": "yes"}])
        with pytest.raises(ValueError, match="line 1: 'text' is NoneType; expected a string"):
            self.score(tmp_path, [{"question_id": 1, "text": None}])
        with pytest.raises(ValueError, match="empty; expected one JSON object a line"):
            self.score(tmp_path, [])


class TestTextVqa:
    def test_slice_gives_the_official_figures_exactly(self):
        folder = DATA / "textvqa"
        scores = score_textvqa(folder / "answers.jsonl", folder / "annotations.json")
        expected = json.loads((folder / "expected.json").read_text())
        assert scores.accuracy == expected["accuracy"]
        assert scores.per_sample == expected["per_sample"]

    @pytest.mark.parametrize(
        ("text", "normal"),
        [
            ("The  Red\tdog", "red dog"),
            ("TWO dogs", "2 dogs"),
            ("none", "0"),
            ("dont", "don't"),
            ("couldntve", "couldntve"),  # one apostrophe may be missing, not two
            ("couldnt've", "couldn't've"),
            ("joe's", "joe 's"),
            ("10,000?", "10000"),
            ("stop.", "stop"),
            ("3.50", "3.50"),  # a full stop before a digit stays
            ("u.s.a.", "usa"),
            ("x-ray", "x ray"),  # a sign between letters becomes a space,
            ("a - b", "b"),  # a sign beside a space goes, and "a" is an article
            ("e-mail - x-ray", "email xray"),  # everywhere, once it stands beside a space somewhere
            ("somebody'd", "somebodyd"),  # as published
            ("", ""),
        ],
    )
    def test_normalisation_by_hand(self, text, normal):
        assert normalise(text) == normal

    @pytest.mark.parametrize(
        ("matches", "score"),
        [
            (0, 0.0),
            (1, 0.3),  # nine of ten subsets hold the one match: 9 · (1/3) / 10
            (2, 0.6),  # eight subsets with 2/3, two with 1/3
            (3, 0.9),  # seven with 1, three with 2/3
            (4, 1.0),
            (10, 1.0),
        ],
    )
    def test_soft_accuracy_by_hand(self, matches, score):
        references = ["blue"] * matches + [f"other {number}" for number in range(10 - matches)]
        assert soft_accuracy("Blue.", references) == pytest.approx(score)

    def test_ties_and_empty_answers(self):
        tie = ["left"] * 5 + ["right"] * 5
        assert soft_accuracy("left", tie) == soft_accuracy("right", tie) == 1.0
        assert soft_accuracy("", tie) == 0.0
        assert soft_accuracy("", ["", "the"] + ["left"] * 8) == pytest.approx(0.6)  # an article alone is empty

    @pytest.mark.parametrize(
        "prompt",
        [
            "What is it?\nAnswer the question using a single word or phrase.",
            "What is it?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
            "Reference OCR token: A, B\nWhat is it?\nAnswer the question using a single word or phrase.",
            "OCR tokens: A, B Question: What is it? Short answer:",
        ],
    )
    def test_question_is_found_in_every_prompt_of_llava(self, tmp_path, prompt):
        answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": "im", "prompt": prompt, "text": "a cup"}])
        annotation = {"image_id": "im", "question": "what is it?", "answers": ["cup"] * 10}
        annotations = write_json(tmp_path / "annotations.json", {"data": [annotation]})
        assert score_textvqa(answers, annotations).accuracy == 1.0

    def test_same_question_put_twice_to_one_image_is_answered_twice(self, tmp_path):
        prompt = "What is it?\nAnswer the question using a single word or phrase."
        row = {"question_id": "im", "prompt": prompt, "text": "cup"}
        annotation = {"image_id": "im", "question": "What is it?", "answers": ["cup"] * 10}
        annotations = write_json(tmp_path / "annotations.json", {"data": [annotation, annotation]})
        assert score_textvqa(write_lines(tmp_path / "two.jsonl", [row, row]), annotations).per_sample == [1.0, 1.0]
        with pytest.raises(ValueError, match="1 missing"):
            score_textvqa(write_lines(tmp_path / "one.jsonl", [row]), annotations)

    def test_other_prompts_are_refused(self, tmp_path):
        answers = write_lines(tmp_path / "answers.jsonl", [{"question_id": "im", "prompt": "What is it?", "text": "x"}])
        annotations = write_json(tmp_path / "annotations.json", {"data": []})
        with pytest.raises(ValueError, match="line 1: cannot tell the question from the prompt 'What is it"):
            score_textvqa(answers, annotations)


class TestGqa:
    def questions(self, tmp_path):
        def question(answer, structural, balanced=True):
            types = {"structural": structural, "semantic": "attr"}
            return {"answer": answer, "isBalanced": balanced, "types": types}

        return write_json(
            tmp_path / "questions.json",
            {
                "1": question("red", "query"),
                "2": question("yes", "verify"),
                "3": question("left", "choose"),
                "4": question("a dog", "query"),
                "5": question("no", "verify", balanced=False),
            },
        )

    def test_by_hand(self, tmp_path):
        texts = {"1": "Red.", "2": "yes", "3": "left ", "4": "dog"}  # a space and a missing article are wrong
        answers = write_lines(tmp_path / "a.jsonl", [{"question_id": k, "text": v} for k, v in texts.items()])
        scores = score_gqa(answers, self.questions(tmp_path))
        assert (scores.accuracy, scores.questions) == (0.5, 4)
        assert scores.per_answer_type == {"binary": 0.5, "open": 0.5}
        assert scores.per_structural_type == {"choose": 0.0, "query": 0.5, "verify": 1.0}

    def test_answers_outside_the_balanced_subset_do_not_count_but_unknown_ones_are_refused(self, tmp_path):
        rows = [{"question_id": k, "text": "x"} for k in "1234"]
        with_unbalanced = write_lines(tmp_path / "a.jsonl", [*rows, {"question_id": 5, "text": "no"}])
        assert score_gqa(with_unbalanced, self.questions(tmp_path)).questions == 4
        with pytest.raises(ValueError, match="question '6' is not in"):
            score_gqa(
                write_lines(tmp_path / "b.jsonl", [*rows, {"question_id": 6, "text": "x"}]), self.questions(tmp_path)
            )

    def test_several_full_stops_go_but_not_inside(self, tmp_path):
        texts = {"1": "RED...", "2": "y.es", "3": "left.", "4": ".a dog"}
        answers = write_lines(tmp_path / "a.jsonl", [{"question_id": k, "text": v} for k, v in texts.items()])
        assert score_gqa(answers, self.questions(tmp_path)).accuracy == 0.5

    def test_other_annotation_files_are_refused(self, tmp_path):
        answers = write_lines(tmp_path / "a.jsonl", [{"question_id": "1", "text": "x"}])
        with pytest.raises(ValueError, match="no column 'isBalanced'; found answer"):
            score_gqa(answers, write_json(tmp_path / "q.json", {"1": {"answer": "x"}}))


class TestScienceQa:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("A", "A"),
            (" B\n", None),  # becomes " B. ": neither alone nor at the start
            ("B\n", "B"),  # becomes "B. "
            ("C. because", "C"),
            ("C.", None),
            ("(C)", None),
            ("c", None),
            ("F", None),
            ("The answer is D.", "D"),
            ("I think. The answer is D", "D"),
            ("The answer is A or, no: The answer is B.", "B"),  # with a full stop goes before without
            ("the answer is A", None),
            ("", None),
        ],
    )
    def test_letters_by_hand(self, text, letter):
        assert parse_letter(text) == letter

    def score(self, tmp_path, answers, split="test"):
        problems = {
            "1": {"choices": ["x", "y"], "answer": 1},
            "2": {"choices": ["x", "y", "z"], "answer": 2},
            "3": {"choices": ["x", "y"], "answer": 0},
            "9": {"choices": ["x", "y"], "answer": 0},
        }
        return score_science_qa(
            write_lines(tmp_path / "answers.jsonl", answers),
            write_json(tmp_path / "problems.json", problems),
            write_json(tmp_path / "pid_splits.json", {"test": ["1", "2", "3"], "val": ["9"]}),
            split,
        )

    def test_accuracy_and_image_accuracy_by_hand(self, tmp_path):
        answers = [
            {"question_id": "1", "prompt": "<image>\nWhich?", "text": "B"},
            {"question_id": "2", "prompt": "<image>\nWhich?", "text": "z"},
            {"question_id": "3", "prompt": "Which?", "text": "The answer is A."},
        ]
        scores = self.score(tmp_path, answers)
        assert scores.accuracy == pytest.approx(2 / 3)
        assert (scores.image_accuracy, scores.questions, scores.image_questions, scores.unparsed) == (0.5, 3, 2, 1)

    def test_a_letter_beyond_the_choices_is_wrong(self, tmp_path):
        scores = self.score(tmp_path, [{"question_id": "9", "text": "C"}], split="val")
        assert (scores.accuracy, scores.unparsed) == (0.0, 0)

    def test_unknown_split_and_missing_answers_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no split 'train'; found test, val"):
            self.score(tmp_path, [{"question_id": "9", "text": "A"}], split="train")
        with pytest.raises(ValueError, match="no answer to question '2'"):
            self.score(tmp_path, [{"question_id": "1", "text": "A"}])


class TestMme:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("Yes", "yes"),
            ("No.", "no"),
            ("Not at all", "no"),
            (" yes", "yes"),
            ("  yes", "other"),  # four characters count
            ("Well, no", "other"),
            ("I know", "other"),
            ("", "other"),
            ("noyes", "no"),
            ("yeah", "other"),
        ],
    )
    def test_four_characters_decide(self, text, said):
        assert yes_no_or_other(text) == said

    def release(self, tmp_path):
        """Two images a subtask, labelled yes, no and no, yes; every second subtask has subfolders."""
        folder = tmp_path / "MME"
        for number, subtask in enumerate(PERCEPTION + COGNITION):
            place = folder / subtask
            if number % 2:
                (place / "images").mkdir(parents=True)
                place /= "questions_answers_YN"
            place.mkdir(parents=True, exist_ok=True)
            gap = "  " if number % 3 == 0 else " "
            for image, labels in (("a", ("Yes", "No")), ("b", ("No", "Yes"))):
                lines = [f"Is it {i}?{gap}Please answer yes or no.\t{label}\n" for i, label in enumerate(labels)]
                (place / f"{image}.txt").write_text("".join(lines), encoding="utf-8")
        return folder

    def answers(self, tmp_path, said):
        rows = []
        for subtask in PERCEPTION + COGNITION:
            for image in "ab":
                for number in range(2):
                    prompt = f"Is it {number}?\nAnswer the question using a single word or phrase."
                    text = said(subtask, image, number)
                    rows.append({"question_id": f"{subtask}/{image}.jpg", "prompt": prompt, "text": text})
        return write_lines(tmp_path / "answers.jsonl", rows)

    def test_all_right_is_2000_and_800(self, tmp_path):
        truth = {("a", 0): "Yes", ("a", 1): "No", ("b", 0): "no.", ("b", 1): "yes, it is"}
        scores = score_mme(self.answers(tmp_path, lambda _, *key: truth[key]), self.release(tmp_path))
        assert (scores.perception, scores.cognition) == (2000.0, 800.0)

    def test_always_yes_is_half_the_accuracy_and_no_accuracy_plus(self, tmp_path):
        scores = score_mme(self.answers(tmp_path, lambda *_: "Yes"), self.release(tmp_path))
        assert (scores.perception, scores.cognition) == (500.0, 200.0)

    def test_by_hand(self, tmp_path):
        def said(subtask, image, number):
            if subtask != "OCR":
                return "maybe"
            return {("a", 0): "Yes", ("a", 1): "No", ("b", 0): "No", ("b", 1): "No"}[image, number]

        scores = score_mme(self.answers(tmp_path, said), self.release(tmp_path))
        ocr = scores.subtasks["OCR"]
        assert (ocr.accuracy, ocr.accuracy_plus, ocr.others, ocr.points) == (0.75, 0.5, 0, 125.0)
        assert scores.perception == 125.0
        assert scores.subtasks["count"].others == 4

    def test_missing_subtask_question_and_odd_files_are_refused(self, tmp_path):
        folder = self.release(tmp_path)
        answers = self.answers(tmp_path, lambda *_: "Yes")
        lines = answers.read_text().splitlines(keepends=True)
        answers.write_text("".join(lines[1:]))
        with pytest.raises(ValueError, match=r"no answer to question \('existence', 'a.txt', 'Is it 0"):
            score_mme(answers, folder)
        answers.write_text("".join([*lines, lines[0]]))
        with pytest.raises(ValueError, match=r"line 57: question \('existence', 'a.txt', .* is answered again"):
            score_mme(answers, folder)
        (folder / "scene" / "a.txt").write_text("Is it 0?\tYes\n")
        with pytest.raises(ValueError, match=r"a.txt: .*; expected two lines 'question<tab>Yes or No'"):
            score_mme(answers, folder)
        for file in (folder / "scene").glob("*.txt"):
            file.unlink()
        with pytest.raises(ValueError, match="expected those of subtask 'scene'"):
            score_mme(answers, folder)


class TestMMBench:
    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("B", "B"),
            ("(B).", "B"),
            ("b", None),
            ("The answer is C: dog house", "C"),
            ("A or B", None),
            ("a cat", "B"),
            ("dog", "A"),
            ("the dog house", None),  # names the texts of A and of C
            ("A dog", "A"),  # the article reads as the letter: a known weakness of the official rule
            ("A cat", "A"),
            ("Z", "Z"),
            ("Cannot determine the answer", "Z"),
            ("bird", None),
            ("", None),
        ],
    )
    def test_letters_by_hand(self, text, letter):
        assert can_infer(text, {"A": "dog", "B": "Cat", "C": "dog house"}) == letter

    COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")
    COLUMNS += ("comment", "split")

    def table(self, tmp_path, rotations=True):
        """Question 1 has two options, question 2 three, each once a rotation."""
        rows = [
            (1, "What?", "", "dog", "cat", "", "nan", "A", "animals", "iVBOR", "s", "coarse", "", "dev"),
            (2, "Why\nthis?", "a hint", "1", "2", "3", "", "C", "numbers", "iVBOR", "s", "fine", "", "dev"),
            (1000001, "What?", "", "cat", "dog", "", "", "B", "animals", "iVBOR", "s", "coarse", "", "dev"),
            (1000002, "Why\nthis?", "a hint", "2", "3", "1", "", "B", "numbers", "iVBOR", "s", "fine", "", "dev"),
            (2000002, "Why\nthis?", "a hint", "3", "1", "2", "", "A", "numbers", "iVBOR", "s", "fine", "", "dev"),
        ]
        kept = rows if rotations else rows[:2]
        text = "\n".join("\t".join(f'"{cell}"' if "\n" in str(cell) else str(cell) for cell in row) for row in kept)
        path = tmp_path / "mmbench.tsv"
        path.write_text("\t".join(self.COLUMNS) + "\n" + text + "\n", encoding="utf-8")
        return path

    def answers(self, tmp_path, texts):
        return write_lines(tmp_path / "answers.jsonl", [{"question_id": k, "text": v} for k, v in texts.items()])

    def test_circular_needs_every_rotation(self, tmp_path):
        texts = {1: "A", 1000001: "B", 2: "C", 1000002: "B", 2000002: "B"}
        scores = score_mmbench(self.answers(tmp_path, texts), self.table(tmp_path))
        assert (scores.vanilla, scores.circular, scores.unmatched) == (1.0, 0.5, 0)
        assert scores.per_category == {"animals": 1.0, "numbers": 0.0}
        assert scores.per_l2_category == {"coarse": 1.0, "fine": 0.0}

    def test_texts_count_and_what_names_no_option_is_wrong(self, tmp_path):
        texts = {1: "a dog", 1000001: "the dog", 2: "I do not know", 1000002: "B", 2000002: "Z"}
        scores = score_mmbench(self.answers(tmp_path, texts), self.table(tmp_path))
        assert (scores.vanilla, scores.circular, scores.unmatched) == (0.5, 0.5, 2)

    def test_a_letter_without_an_option_names_nothing(self, tmp_path):
        scores = score_mmbench(self.answers(tmp_path, {1: "D", 2: "C"}), self.table(tmp_path, rotations=False))
        assert (scores.vanilla, scores.circular, scores.unmatched) == (0.5, None, 1)

    def test_missing_rotation_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no answer to question '1000001' .*\(1 missing\)"):
            score_mmbench(self.answers(tmp_path, {1: "A", 2: "C", 1000002: "B", 2000002: "A"}), self.table(tmp_path))

    def test_submission_has_the_columns_of_llavas_converter(self, tmp_path):
        texts = {1: "A", 1000001: "B", 2: "line\nend", 1000002: "B", 2000002: ""}
        output = tmp_path / "submission.tsv"
        write_mmbench_submission(self.answers(tmp_path, texts), self.table(tmp_path), output)
        header = output.read_text().splitlines()[0].split("\t")
        assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]

    def test_xlsx_submission_reads_back(self, tmp_path):
        openpyxl = pytest.importorskip("openpyxl")
        texts = {1: "A", 1000001: "B", 2: "C", 1000002: "B", 2000002: ""}
        output = tmp_path / "submission.xlsx"
        write_mmbench_submission(self.answers(tmp_path, texts), self.table(tmp_path), output)
        rows = list(openpyxl.load_workbook(output).active.iter_rows(values_only=True))
        assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
        assert [row[6] for row in rows[1:]] == ["A", "C", "B", "B", None]

    def test_other_endings_and_tables_are_refused(self, tmp_path):
        answers = self.answers(tmp_path, {1: "A", 2: "C"})
        with pytest.raises(ValueError, match=r"expected a name ending in .xlsx or .tsv"):
            write_mmbench_submission(answers, self.table(tmp_path, rotations=False), tmp_path / "s.csv")
        (tmp_path / "other.tsv").write_text("id\tquestion\n1\twhat\n")
        with pytest.raises(ValueError, match="no column 'index'; found id, question"):
            score_mmbench(answers, tmp_path / "other.tsv")
