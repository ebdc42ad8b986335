"""How good is it: win rate of one policy over another, pair accuracy of a reward model, perplexity of a language model."""

from pyrlhf.evaluate.accuracy import Accuracy, reward_accuracy, score_rankings
from pyrlhf.evaluate.perplexity import Perplexity, perplexity
from pyrlhf.evaluate.samples import answer_row, prompt_part, prompt_text, sample_answers
from pyrlhf.evaluate.winrate import WinRate, win_rate

__all__ = [
    "Accuracy",
    "Perplexity",
    "WinRate",
    "answer_row",
    "perplexity",
    "prompt_part",
    "prompt_text",
    "reward_accuracy",
    "sample_answers",
    "score_rankings",
    "win_rate",
]
