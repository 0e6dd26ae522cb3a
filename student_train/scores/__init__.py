"""Scores of a student's answers: the benchmarks of both papers and three scores for small worlds.

Every scorer takes files in the format LLaVA's evaluation writes (one JSON object a line: `question_id`, `prompt`,
`text`) and the benchmark's own annotation files, and gives what the benchmark's official script gives on them. All
figures are fractions between 0 and 1, MME's points excepted. None of this needs torch.
"""

from student_train.scores.files import score_file
from student_train.scores.gqa import GqaScores, score_gqa
from student_train.scores.hallucination import HallucinationScores, hallucination
from student_train.scores.mmbench import MMBenchScores, score_mmbench, write_mmbench_submission
from student_train.scores.mme import MmeScores, score_mme
from student_train.scores.pope import PopeScores, score_pope
from student_train.scores.science_qa import ScienceQaScores, score_science_qa
from student_train.scores.textvqa import TextVqaScores, score_textvqa
from student_train.scores.vqa import VqaAccuracy, vqa_accuracy
from student_train.scores.yes_no import YesNoScores, yes_no_scores

__all__ = [
    "GqaScores",
    "HallucinationScores",
    "MMBenchScores",
    "MmeScores",
    "PopeScores",
    "ScienceQaScores",
    "TextVqaScores",
    "VqaAccuracy",
    "YesNoScores",
    "hallucination",
    "score_file",
    "score_gqa",
    "score_mmbench",
    "score_mme",
    "score_pope",
    "score_science_qa",
    "score_textvqa",
    "vqa_accuracy",
    "write_mmbench_submission",
    "yes_no_scores",
]
