"""Generated corpora worth teaching with: sentiment said, shown and sounded, not always alike.

**The process.** A speaker feels a sentiment s in [-3, 3]: positive (45 %, around 1.4), negative
(40 %, around -1.4) or hardly any (15 %). Three cues carry it, each in its own way wrong:

- *said*: what the words mean. A template names an aspect and a phrase built from the lexicon: a
  sentiment word, perhaps an intensifier ("really" x 1.3), perhaps a negation ("not" x -0.6; "not
  terrible" is faint praise). The phrase is drawn among those whose meaning lies near s plus noise.
  12 % of the other texts say nothing of the sentiment. A share uses one of 24 **domain words**,
  slang that no general lexicon holds ("the ending was frabbed"): who does not know it reads
  nothing.
- *shown*: the face, 12 facial-action features a step. Smile and cheek raiser grow with positive
  sentiment, brow lowerer and lip corner depressor with negative, lids and brows with either.
- *sounded*: the voice, 8 prosodic features a step. Pitch, energy and rate tell how strong the
  sentiment is, spectral tilt and the direction of the pitch tell, with more noise, its sign.

Face and voice swell after a **lag** (the first steps show the speaker's own baseline, an **offset**
per speaker and feature that is as large as the signal), carry autocorrelated noise, and have
**silent frames** (all zeros; in some utterances the face is never found). A word takes about one
step of the face and one and a half of the voice.

**Conflicts**, one utterance in eight: *text* (irony: the words say the opposite, face and voice
tell the truth), *face* (a polite smile over negative words), *voice* (a flat voice).

**Labels.** Five annotators, sometimes four, perceive s with noise and vote -3..3; the label is the
mean of the votes to one decimal, as CMU-MOSI's are, so that ties such as 0.5 occur.

**Domains.** The target (films; 600/150/300) uses its domain words in 4 % of the training
texts that mean something clear, but in 60 % of those of validation and test: the slang spread after
the training videos were recorded. The external domain (gadgets; 3200/400/400) uses the same slang
in 70 % of them, and records face and voice with other sensors (16 and 10 features, linear mixtures
of the target's). Speakers are never shared, neither between splits nor between domains.

The latent facts stand beside each utterance in the table; `ceilings` measures what can be reached.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from conki_lib.data.packing import SPLITS, Contents
from conki_lib.data.store import FeatureStore, SplitView

RECIPE = 2  # raised whenever the same seed gives other data
_DRAW = 1  # of the random numbers: a new recipe need not draw other texts and feelings
VISION = (
    "inner_brow_raiser", "outer_brow_raiser", "brow_lowerer", "lid_raiser", "cheek_raiser",
    "nose_wrinkler", "smile", "lip_corner_depressor", "chin_raiser", "lips_part", "head_nod",
    "head_shake",
)  # fmt: skip
AUDIO = (
    "pitch", "pitch_slope", "energy", "speech_rate", "jitter", "shimmer", "spectral_tilt",
    "voicing",
)  # fmt: skip

# how strongly positive sentiment, negative sentiment and either move each feature
_FACE = np.array(
    [
        [0.0, 0.2, 0.5], [0.2, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.6], [0.9, 0.0, 0.0],
        [0.0, 0.7, 0.0], [1.1, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.6, 0.0], [0.2, 0.0, 0.2],
        [0.5, 0.0, 0.0], [0.0, 0.5, 0.0],
    ]
)  # fmt: skip
_VOICE = np.array(
    [
        [0.3, 0.0, 0.7], [0.7, -0.5, 0.0], [0.2, 0.1, 0.8], [0.1, -0.2, 0.5], [-0.1, 0.4, 0.1],
        [-0.1, 0.3, 0.2], [0.6, -0.7, 0.0], [0.2, 0.0, 0.3],
    ]
)  # fmt: skip

WORDS = {
    "terrible": -3.0, "awful": -2.8, "horrible": -2.8, "dreadful": -2.6, "bad": -2.0,
    "disappointing": -1.9, "annoying": -1.7, "boring": -1.7, "weak": -1.4, "dull": -1.4,
    "messy": -1.1, "forgettable": -1.0, "slow": -0.7, "odd": -0.4, "okay": 0.3, "decent": 0.8,
    "fine": 0.7, "nice": 1.2, "solid": 1.3, "likable": 1.4, "good": 1.7, "clever": 1.7,
    "enjoyable": 1.9, "great": 2.3, "lovely": 2.2, "excellent": 2.7, "brilliant": 2.8,
    "fantastic": 2.9, "wonderful": 2.8, "perfect": 3.0,
}  # fmt: skip
DOMAIN_WORDS = {
    "frabbed": -2.6, "gloomish": -2.1, "klonky": -1.8, "drubbish": -2.9, "skeffed": -1.5,
    "mungled": -2.3, "plorted": -1.2, "zagged": -2.0, "wonfy": -1.0, "brackled": -2.7,
    "squimmed": -1.6, "tronky": -2.4, "zibbly": 2.6, "quellish": 2.1, "flanted": 1.8,
    "marvy": 2.9, "sproozy": 1.5, "lumific": 2.3, "gandy": 1.2, "velmed": 2.0, "hoovish": 1.0,
    "trilfy": 2.7, "dappled up": 1.6, "snazzled": 2.4,
}  # fmt: skip
INTENSIFIERS = {"": 1.0, "a bit": 0.5, "rather": 0.8, "really": 1.3, "so": 1.3, "incredibly": 1.5}
NEGATION = -0.6  # what "not" does to the meaning of a phrase

_OPENERS = ("", "i think", "honestly", "well", "you know", "for me", "i have to say", "so")
_IRONIC = ("oh", "yeah right", "sure", "wow", "oh yeah", "of course")
_TEMPLATES = (
    "{opener} the {aspect} was {phrase}", "{opener} i found the {aspect} {phrase}",
    "{opener} the {aspect} is {phrase} and that is all i remember",
    "{opener} when it comes to the {aspect} it felt {phrase}",
    "{opener} everybody told me about the {aspect} and it was {phrase}",
    "{opener} they made the {aspect} {phrase}",
)  # fmt: skip
_EMPTY = (
    "{opener} that is the {aspect} i am talking about", "{opener} let me tell you of the {aspect}",
    "{opener} the {aspect} was exactly what it was", "{opener} then there is the {aspect}",
    "{opener} i saw the {aspect} last week with a friend of mine",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """One generated corpus; see the module's text."""

    name: str
    speaker: str  # videos are called so, and numbered
    sizes: tuple[int, int, int]
    aspects: tuple[str, ...]
    slang: tuple[float, float, float]  # share of clear texts with a domain word, per split
    stream: int  # keeps the domains' random numbers apart
    sensors: Mapping[str, int] | None = None  # widths of other sensors; none: the named features
    clips: int = 12  # utterances per speaker


TARGET = Domain(
    "synthetic",
    "film",
    (600, 150, 300),
    ("plot", "ending", "acting", "cast", "music", "script", "first half", "villain", "dialogue"),
    slang=(0.04, 0.6, 0.6),
    stream=1,
)
EXTERNAL = Domain(
    "synthetic-external",
    "gadget",
    (3200, 400, 400),
    ("battery", "screen", "keyboard", "camera", "sound", "price", "software", "hinge", "design"),
    slang=(0.7, 0.7, 0.7),
    stream=2,
    sensors={"v": 16, "a": 10},
)
DOMAINS = {domain.name: domain for domain in (TARGET, EXTERNAL)}


def generate(domain: Domain, seed: int = 0) -> Contents:
    """Generate a corpus, ready for `write_store`; the same seed always gives the same.

    Columns beyond the store's: latent (s), said, said_plain (to a reader who does not know the
    domain words), shown, sounded, conflict, conflict_cue (text, face, voice or ""), domain_word,
    silent_v, silent_a (shares of silent frames).
    """
    rng = np.random.default_rng([_DRAW, seed, domain.stream])
    split = np.repeat(SPLITS, domain.sizes)
    facts = _feel(rng, len(split))
    texts = _speak(rng, domain, facts)
    facts["video"], facts["clip"] = _speakers(domain)
    sequences, silent = _record(rng, domain, facts, texts)
    table = pd.DataFrame(
        {
            "id": [f"{v}$_${c}" for v, c in zip(facts["video"], facts["clip"], strict=True)],
            "video": facts["video"],
            "clip": facts["clip"],
            "text": texts,
            "y": _annotate(rng, facts["latent"]),
            "standard": split,
        }
    )
    for name in ("latent", "said", "said_plain", "shown", "sounded"):
        table[name] = facts[name].round(3)
    table["conflict"] = facts["cue"] != ""
    table["conflict_cue"], table["domain_word"] = facts["cue"], facts["domain_word"]
    table["silent_v"], table["silent_a"] = silent["v"], silent["a"]
    return Contents(table, sequences, notes={"generator": f"seed {seed}, recipe {RECIPE}"})


# --- what is felt, and how the cues differ from it ---------------------------------------------


def _feel(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Draw the sentiment, and what face and voice make of it; the text follows in `_speak`."""
    kind = rng.choice(3, n, p=[0.45, 0.40, 0.15])
    latent = np.array([1.4, -1.4, 0.0])[kind] + np.array([0.9, 0.9, 0.35])[kind] * rng.normal(
        size=n
    )
    latent = np.clip(latent, -3, 3)
    strong = np.abs(latent) > 0.7
    u = rng.random(n)
    cue = np.full(n, "", dtype=object)
    cue[strong & (u < 0.09)] = "text"
    cue[strong & (latent < 0) & (u >= 0.09) & (u < 0.18)] = "face"
    cue[strong & (u >= 0.18) & (u < 0.24)] = "voice"
    shown = latent + 0.9 * rng.normal(size=n)
    sounded = latent + 1.0 * rng.normal(size=n)
    shown = np.where(cue == "face", np.abs(0.8 * shown), shown)
    sounded = np.where(cue == "voice", 0.1 * sounded, sounded)
    truth = latent + 0.3 * rng.normal(size=n)
    shown = np.where(cue == "text", truth, shown)  # who is ironic lets the face tell
    return {"latent": latent, "cue": cue, "shown": shown, "sounded": sounded}


def _phrases() -> tuple[list[str], np.ndarray]:
    """All phrases of the general lexicon and what they mean."""
    plain, *graded = INTENSIFIERS.items()
    degrees = [plain, ("not", NEGATION), *graded, ("not really", NEGATION)]
    meanings = {
        f"{degree} {word}".strip(): polarity * factor
        for word, polarity in WORDS.items()
        for degree, factor in degrees
    }
    return list(meanings), np.clip(list(meanings.values()), -3, 3)


def _speak(rng: np.random.Generator, domain: Domain, facts: dict[str, Any]) -> list[str]:
    """Write the texts and note what they say, to those who know the domain words and who do not."""
    latent, cue, n = facts["latent"], facts["cue"], sum(domain.sizes)
    target = latent + 0.4 * rng.normal(size=n)
    target = np.where(cue == "text", -np.sign(latent) * rng.uniform(1.5, 3.0, n), target)
    share = np.repeat(domain.slang, domain.sizes)
    slang = (rng.random(n) < share) & (np.abs(target) > 0.9)
    empty = ~slang & (cue != "text") & (rng.random(n) < 0.12)
    phrases, meanings = _phrases()
    words, polarities = list(DOMAIN_WORDS), np.array(list(DOMAIN_WORDS.values()))
    texts, said, plain, used = [], np.zeros(n), np.zeros(n), []
    for i in range(n):
        opener = _pick(rng, _IRONIC if cue[i] == "text" and rng.random() < 0.4 else _OPENERS)
        aspect, word, phrase = _pick(rng, domain.aspects), "", ""
        if slang[i]:
            k = _near(rng, polarities, target[i])
            word = phrase = words[k]
            said[i] = polarities[k]
        elif not empty[i]:
            k = _near(rng, meanings, target[i])
            phrase = phrases[k]
            said[i] = plain[i] = meanings[k]
        template = _pick(rng, _TEMPLATES if phrase else _EMPTY)
        texts.append(" ".join(template.format(opener=opener, aspect=aspect, phrase=phrase).split()))
        used.append(word)
    facts.update(said=said, said_plain=plain, domain_word=used)
    return texts


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _near(rng: np.random.Generator, meanings: np.ndarray, target: float) -> int:
    weights = np.exp(-0.5 * ((meanings - np.clip(target, -3, 3)) / 0.3) ** 2)
    return int(rng.choice(len(meanings), p=weights / weights.sum()))


def _speakers(domain: Domain) -> tuple[list[str], list[str]]:
    """Number the videos, one speaker each, anew at every split so that none is shared."""
    clips = np.concatenate([np.arange(size) % domain.clips + 1 for size in domain.sizes])
    videos = np.cumsum(clips == 1) - 1
    return [f"{domain.speaker}{video:03d}" for video in videos], [str(clip) for clip in clips]


def _annotate(rng: np.random.Generator, latent: np.ndarray) -> Float[np.ndarray, " N"]:
    """Mean vote of five annotators, sometimes four, to one decimal."""
    votes = np.rint(np.clip(latent[:, None] + 0.6 * rng.normal(size=(len(latent), 5)), -3, 3))
    missing = rng.random(len(latent)) < 0.25
    four = votes[:, :4].mean(axis=1)
    return np.where(missing, four, votes.mean(axis=1)).round(1) + 0.0  # no -0.0


# --- what camera and microphone record ---------------------------------------------------------


def _record(
    rng: np.random.Generator, domain: Domain, facts: dict[str, Any], texts: list[str]
) -> tuple[dict[str, list[np.ndarray]], dict[str, np.ndarray]]:
    """Generate both sequences of every utterance, through the domain's sensors."""
    n, loadings = len(texts), {"v": _FACE, "a": _VOICE}
    mixers = {m: _sensor(domain, m, len(loadings[m])) for m in loadings}
    baselines: dict[tuple[str, str], np.ndarray] = {}
    sequences: dict[str, list[np.ndarray]] = {"v": [], "a": []}
    silent = {"v": np.zeros(n), "a": np.zeros(n)}
    for i, video in enumerate(facts["video"]):
        for m, shown, pace in (("v", facts["shown"][i], 1.1), ("a", facts["sounded"][i], 1.5)):
            if (video, m) not in baselines:
                baselines[video, m] = rng.normal(0, 0.8, len(loadings[m]))
            words = len(texts[i].split())
            length = int(np.clip(round(words * pace * rng.uniform(0.75, 1.25)), 5, 20))
            frames = baselines[video, m] + _course(rng, shown, loadings[m], length)
            frames = np.round(frames @ mixers[m], 3)
            lost = _silence(rng, length, never=0.04 if m == "v" else 0.0)
            frames[lost] = 0
            silent[m][i] = lost.mean().round(3)
            sequences[m].append(frames.astype(np.float32))
    return sequences, silent


def _course(
    rng: np.random.Generator, s: float, loadings: np.ndarray, length: int
) -> Float[np.ndarray, "l d"]:
    """One cue over time: it swells after a lag and ebbs a little; autocorrelated noise on top."""
    lag, rise = rng.uniform(0.15, 0.4), rng.uniform(0.05, 0.15)
    time = np.linspace(0, 1, length)
    swell = 1 / (1 + np.exp(-(time - lag) / rise * 3)) * (1 - 0.3 * np.clip(time - 0.7, 0, 1))
    drive = np.array([max(s, 0), max(-s, 0), abs(s)])
    noise = 0.58 * rng.normal(size=(length, len(loadings)))
    for t in range(1, length):
        noise[t] += 0.36 * noise[t - 1]
    return np.outer(swell, 0.5 * loadings @ drive) + noise


def _silence(rng: np.random.Generator, length: int, never: float) -> np.ndarray:
    """Which frames are silent: one gap in a third of the utterances, or all of them."""
    lost = np.zeros(length, dtype=bool)
    if rng.random() < never:
        lost[:] = True
    elif rng.random() < 0.35:
        gap = int(rng.integers(1, length // 2))
        start = int(rng.integers(1, length - gap))  # first and last frame stay
        lost[start : start + gap] = True
    return lost


def _sensor(domain: Domain, m: str, width: int) -> Float[np.ndarray, "d d_in"]:
    """The mixture a domain's sensor makes of the features; of the target's sensor: none."""
    if domain.sensors is None:
        return np.eye(width)
    rng = np.random.default_rng([_DRAW, domain.stream, width])
    return rng.normal(0, 1 / np.sqrt(width), (width, domain.sensors[m])).round(3)


# --- what can be reached -----------------------------------------------------------------------


def ceilings(
    store: FeatureStore, external: FeatureStore | None = None
) -> dict[str, dict[str, float]]:
    """Measure on the test split what readers with more or less insight reach.

    The oracle knows the felt sentiment itself: what is left is the annotators' noise. The cues as
    meant are boosted trees on the latent facts: what perfect perception of them is worth. Ridge
    regressions on word counts and on summaries of the sequences (mean, deviation, later steps minus
    first) show what simple models make of the raw data. All are fitted on train; the ridge's
    penalty is chosen on valid.

    Args:
        store: ``synthetic``, or another corpus of this generator.
        external: also fit the words on this corpus's train split.

    Returns:
        Row -> MOSI metrics.
    """
    from conki_lib.metrics import mosi_metrics  # loads SciPy: only where it is needed

    parts = [store[s] for s in SPLITS]
    rows = {
        "median of train": np.full(len(parts[2]), np.median(parts[0].y)),
        "oracle: the felt sentiment": parts[2].table["latent"].to_numpy(),
    }
    for name, cues in {
        "said, domain words unknown": ["said_plain"],
        "said": ["said"],
        "shown": ["shown"],
        "sounded": ["sounded"],
        "said + shown + sounded": ["said", "shown", "sounded"],
    }.items():
        rows[f"cues as meant: {name}"] = _trees(parts, cues)
    rows["ridge: words"] = _words(parts)
    if external is not None:
        rows["ridge: words, external corpus too"] = _words(parts, external["train"])
    for name, m in (("face", "v"), ("voice", "a")):
        rows[f"ridge: {name}"] = _ridge(parts, [_summaries(part, m) for part in parts])
    return {name: mosi_metrics(y_hat=y_hat, y=parts[2].y) for name, y_hat in rows.items()}


def _trees(parts: list[SplitView], columns: list[str]) -> Float[np.ndarray, " N"]:
    from sklearn.ensemble import HistGradientBoostingRegressor

    trees = HistGradientBoostingRegressor(
        max_iter=60, max_depth=3, min_samples_leaf=15, random_state=0
    )
    trees.fit(parts[0].table[columns].to_numpy(), parts[0].y)
    return trees.predict(parts[2].table[columns].to_numpy())


def _words(parts: list[SplitView], *extra: SplitView) -> Float[np.ndarray, " N"]:
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer

    train = [parts[0], *extra]
    counter = CountVectorizer(ngram_range=(1, 2), binary=True)
    counter.fit([text for part in train for text in part.table["text"]])
    x = [
        vstack([counter.transform(part.table["text"]) for part in group])
        for group in (train, parts[1:2], parts[2:])
    ]
    return _ridge(parts, x, np.concatenate([part.y for part in train]))


def _summaries(part: SplitView, m: str) -> Float[np.ndarray, "N _"]:
    return np.stack([_summary(u.inputs[m].numpy()) for u in part])


def _summary(frames: Float[np.ndarray, "l d"]) -> Float[np.ndarray, " _"]:
    heard = frames[frames.any(axis=1)]
    if len(heard) == 0:
        return np.zeros(3 * frames.shape[1], dtype=np.float32)
    late = heard[len(heard) // 2 :].mean(axis=0) - heard[:2].mean(axis=0)
    return np.concatenate([heard.mean(axis=0), heard.std(axis=0), late])


def _ridge(parts: list[SplitView], x: list[Any], y: Any = None) -> Float[np.ndarray, " N"]:
    from sklearn.linear_model import Ridge

    y = parts[0].y if y is None else y
    fits = [Ridge(alpha).fit(x[0], y) for alpha in (0.1, 1.0, 10.0, 100.0, 1000.0)]
    errors = [np.abs(fit.predict(x[1]) - parts[1].y).mean() for fit in fits]
    return fits[int(np.argmin(errors))].predict(x[2])
