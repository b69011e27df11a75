"""The 81 published systems as data: where each one lives here and what its paper claims."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper as data: on ``recipe``, ``better`` scores better than ``than`` on ``metric``."""

    says: str
    """The claim in one sentence."""
    recipe: str
    """Which comparison tests it: ``capability-data``, the name of its committed rows."""
    better: str
    """Label of the row that should win."""
    than: str
    """Label of the row it is compared with."""
    metric: str
    """Name of a metric in the rows; of some less is better, see `koinon.bench.statistics.falls`."""
    why: str = ""
    """Where the claim does not hold here: the reason found."""
    times: float = 1.0
    """What it is compared with is multiplied by this first: 0.5 for half of it or less, where less is better."""
    by: float = 0.0
    """How much better it is said to be at least, in the metric's own units."""


@dataclass(frozen=True)
class System:
    """One of the 81 papers; a row, not a file: its parts are methods, its variants are settings."""

    number: int
    title: str
    year: int
    url: str
    capability: str
    methods: tuple[str, ...] = ()
    """Names of the method files that make it up; none while the system is absent."""
    claims: tuple[Claim, ...] = ()
    departures: tuple[str, ...] = ()
    """What is done otherwise here than in the paper, and why."""


def _home_claims(recipe: str, kind: str, why: str, whys: Mapping[str, str]) -> tuple[Claim, ...]:
    """What the HoME paper says of its whole and of its parts, on one data set at equal parameters and budget.

    Args:
        recipe: name of the rows.
        kind: of the metric that counts.
        why: reason for those that do not hold.
        whys: reasons of their own for some, by what they say.
    """
    mean, sparse = f"mean.{kind}", f"sparse.{kind}"
    claims = [
        ("HoME predicts better than MMoE", "home", "mmoe", mean),
        ("HoME predicts better than PLE", "home", "ple", mean),
        ("HoME predicts better than a shared bottom", "home", "shared_bottom", mean),
        ("normalised Swish experts help MMoE", "mmoe_swish", "mmoe", mean),
        ("normalised Swish experts do not explain the gain over MMoE", "home", "mmoe_swish", mean),
        ("normalised Swish experts do not explain the gain over PLE", "home", "ple_swish", mean),
        ("HoME helps sparse tasks more than PLE does", "home", "ple", sparse),
        ("the feature gates of the meta level help", "home", "home_no_meta_feature_gate", mean),
        ("the feature gates of the task level help", "home", "home_no_task_feature_gate", mean),
        ("the self gates help", "home", "home_no_self_gate", mean),
        ("the hierarchy mask helps", "home", "home_no_mask", mean),
        ("normalised Swish experts help HoME", "home", "home_relu", mean),
        ("normalised Swish experts do not collapse", "home", "home_relu", "collapse"),
        ("HoME's shared experts are less owned by one task than PLE's", "home", "ple", "degradation"),
        ("the mask keeps shared experts from one owner", "home", "home_no_mask", "degradation"),
        ("the self gate keeps sparse tasks on their experts", "home", "home_no_self_gate", "underfitting"),
        ("HoME's sparse tasks use their own experts more than PLE's", "home", "ple", "underfitting"),
    ]
    return tuple(
        Claim(says, recipe, better, than, metric, whys.get(says, why)) for says, better, than, metric in claims
    )


_MAIN_GATE = (
    "the meter reads the main gate: with the self gate beside it a task's own experts reach the tower"
    " anyway, and the main gate turns to the shared ones"
)
_HOME = (
    *_home_claims(
        "share-movielens",
        "gauc",
        "five seeds cannot show it: a difference of two networks varies by 0.006 between seeds, so that a"
        " gain under 0.008 stays hidden, and the paper's are near 0.005; the four tasks are thresholds of"
        " one rating, which a shared bottom serves as well",
        {
            "normalised Swish experts help MMoE": (
                "MMoE's ReLU experts do collapse (the worst of them gives 57 to 68 % zeros), but the others are "
                "enough for four thresholds of one rating"
            ),
            "HoME's shared experts are less owned by one task than PLE's": (
                "ownership varies more between seeds (0.29 to 0.57 in HoME, 0.34 to 0.65 in PLE) than between the two"
            ),
            "the mask keeps shared experts from one owner": (
                "ownership varies more between seeds (0.29 to 0.57 with the mask, 0.23 to 0.77 without) than "
                "between the two"
            ),
            "the self gate keeps sparse tasks on their experts": _MAIN_GATE,
            "HoME's sparse tasks use their own experts more than PLE's": (
                "use varies more between seeds (0.07 to 0.41 of the fair share in HoME, 0.02 to 0.59 in PLE) than "
                "between the two"
            ),
        },
    ),
    *_home_claims(
        "share-related",
        "auc",
        "the difference is smaller than what five seeds can show",
        {
            "normalised Swish experts do not explain the gain over MMoE": (
                "here they do: MMoE with the same experts predicts as well as HoME"
            ),
            "normalised Swish experts do not explain the gain over PLE": (
                "here they do: PLE with the same experts predicts better than HoME"
            ),
            "the feature gates of the meta level help": (
                "they harm: the inputs are independent normal numbers that count the same in every row, so that "
                "there is nothing to gate; HoME without them is the best of all"
            ),
            "the self gates help": (
                "there is no underfitting to cure: without the self gate too, sparse tasks use their own experts at"
                " about their fair share"
            ),
            "HoME's shared experts are less owned by one task than PLE's": (
                "ownership varies more between seeds (0.27 to 0.53 in HoME, 0.21 to 0.58 in PLE) than between the two"
            ),
            "the mask keeps shared experts from one owner": (
                "ownership varies more between seeds (0.27 to 0.53 in HoME) than between the two"
            ),
            "the self gate keeps sparse tasks on their experts": _MAIN_GATE,
            "HoME's sparse tasks use their own experts more than PLE's": (
                "HoME's do at 0.88 of the fair share and PLE's at 0.65, but between seeds HoME's vary from 0.30 to 1.73"
            ),
        },
    ),
)

_TWIN = (
    *(
        Claim(f"Twin-Merging serves all tasks better than {name}", "merge-glyphs", "twin", label, "mean.normalised")
        for name, label in (
            ("task arithmetic", "task_arithmetic"),
            ("TIES", "ties"),
            ("DARE with TIES' election", "dare_ties"),
            ("Fisher merging", "fisher"),
            ("RegMean", "regmean"),
            ("AdaMerging", "adamerging"),
            ("averaging", "average"),
            ("DARE", "dare"),
        )
    ),
    Claim("sharing an expert helps", "merge-glyphs", "twin", "twin_no_shared", "mean.normalised"),
    Claim("merging for each input helps", "merge-glyphs", "twin", "twin_static", "mean.normalised"),
    Claim(
        "singular values keep more than the largest elements",
        "merge-glyphs",
        "twin",
        "twin_magnitude",
        "mean.normalised",
    ),
    Claim("singular values keep more than random elements", "merge-glyphs", "twin", "twin_random", "mean.normalised"),
)

_UNMOVED = (
    "at the paper's rates, a perturbation moves by at most 0.04 a pixel, so that the mask is that of Concrete "
    "AdaMerging; told the trigger in its place, attacks succeed more often, as a confidently wrong model has the low "
    "entropy that the mask is learnt for"
)
_LABELS = (
    "a defence of a merged model learns from up to 500 labelled rows of each task, of which DAM is given none; "
    "fine-tuning on those labels alone takes away most of the backdoor"
)
_DAM = (
    *(
        Claim(
            f"less backdoor succession and transfer than in {name}",
            "merge-poisoned",
            "dam",
            label,
            "asr.mean",
            why,
        )
        for name, label, why in (
            ("Concrete AdaMerging", "concrete_adamerging", _UNMOVED),
            ("AdaMerging", "adamerging", _UNMOVED),
            ("task arithmetic", "task_arithmetic", _UNMOVED),
            ("TIES", "ties", _UNMOVED),
            ("a model whose weights were masked after merging (AWM)", "awm", _LABELS),
            ("a model that was unlearnt after merging (SAU)", "sau", _LABELS),
        )
    ),
    Claim(
        "the perturbation helps task arithmetic too",
        "merge-poisoned",
        "dam_task_arithmetic",
        "concrete_task_arithmetic",
        "asr.mean",
        _UNMOVED,
    ),
    Claim(
        "less backdoor succession than by halving all task vectors",
        "merge-poisoned",
        "dam",
        "task_arithmetic_half",
        "asr.succession",
        "what lowers attack success here is smaller task vectors, and DAM learns larger ones, as AdaMerging does",
    ),
    Claim(
        "more accurate than halving all task vectors",
        "merge-poisoned",
        "dam",
        "task_arithmetic_half",
        "mean.normalised",
    ),
    Claim(
        "as the perturbation counts more, less is taken over",
        "merge-poisoned",
        "dam_weight_1",
        "dam_weight_0.01",
        "asr.mean",
        _UNMOVED,
    ),
    Claim(
        "at 10 times the mask's rate and 100 times the perturbation's, less than in Concrete AdaMerging at that rate",
        "merge-poisoned",
        "dam_fast",
        "concrete_adamerging_fast",
        "asr.mean",
        why=(
            "moved that far, the perturbation is still no trigger, and what it costs the mask is accuracy: attacks "
            "succeed as often or more"
        ),
    ),
)

_EDITORS = (
    "edit.alphaedit",
    "edit.finetune",
    "edit.grace",
    "edit.ike",
    "edit.kn",
    "edit.lora",
    "edit.memit",
    "edit.mend",
    "edit.rome",
    "edit.serac",
    "edit.wise",
)
"""What the two papers on toolboxes for editing compare."""

_NO_COPYING = (
    "the small model copies an answer from its prompt only for subjects it does not know; of known ones it says what "
    "it was taught"
)

_ROW, _ALONE = "row.200", "alone.modification"
"""After 200 facts one after the other; each of some known facts taught alone."""


def _each(
    says: str,
    recipe: str,
    better: str,
    than: Mapping[str, str],
    metric: str,
    whys: Mapping[str, str] | None = None,
) -> tuple[Claim, ...]:
    """One claim for each row that should be worse.

    Args:
        says: the sentence, ``{}`` standing for what it is compared with.
        recipe: see `Claim`.
        better: see `Claim`.
        than: label to name.
        metric: see `Claim`.
        whys: label to the reason found.
    """
    return tuple(
        Claim(says.format(name), recipe, better, label, metric, (whys or {}).get(label, ""))
        for label, name in than.items()
    )


_WISE = (
    *_each(
        "WISE is reliable, general and local at once, more than {}",
        "edit-world",
        "wise",
        {
            "finetune_m": "FT-M",
            "finetune_l": "FT-L",
            "lora": "LoRA",
            "rome": "ROME",
            "memit": "MEMIT",
            "mend": "MEND",
            "serac": "SERAC",
            "grace": "GRACE",
        },
        f"{_ROW}.triangle",
    ),
    *_each("WISE generalises more than {}", "edit-world", "wise", {"grace": "GRACE"}, f"{_ROW}.generality"),
    *_each(
        "WISE leaves more alone than {}",
        "edit-world",
        "wise",
        {"finetune_m": "FT-M", "rome": "ROME", "memit": "MEMIT"},
        f"{_ROW}.locality",
    ),
    *_each(
        "{}",
        "edit-world",
        "wise",
        {
            "wise_always": "deciding whether to ask the side memory helps",
            "wise_one_shard": "shards help",
            "wise_no_margin": "the routing loss helps",
        },
        f"{_ROW}.triangle",
        whys={
            "wise_no_margin": (
                "here it does not help: told by its last token's excitement, relative to what goes in, a prompt finds "
                "its side memory without it; the loss makes memories larger, which costs neighbours their answers"
            )
        },
    ),
    *(
        Claim(says, "edit-wise", better, than, "row.100.triangle")
        for says, better, than in (
            ("masks of their own keep merged shards apart", "wise_fours", "wise_fours_same_mask"),
            ("merging by elected signs keeps more than averaging", "wise_fours", "wise_fours_averaged"),
            ("several merged memories keep more than one (Retrieve, Merge)", "wise_fours", "wise_merged"),
        )
    ),
)
_EASYEDIT = (
    *(
        Claim(f"{name} edits better than FT-L", "edit-world", label, "finetune_l", f"{_ALONE}.harmonic", why=why)
        for name, label, why in (
            ("ROME", "rome", ""),
            ("MEMIT", "memit", ""),
            (
                "SERAC",
                "serac",
                (
                    "alone, FT-L at the first layer is as good in four seeds of five: SERAC's second model, small as "
                    "it is, gives two or three facts of four; one after the other, SERAC is far ahead"
                ),
            ),
            ("IKE", "ike", _NO_COPYING),
        )
    ),
    *(
        Claim(f"{name} leaves more alone than IKE", "edit-world", label, "ike", f"{_ALONE}.locality")
        for name, label in (
            ("FT-L", "finetune_l"),
            ("ROME", "rome"),
            ("MEMIT", "memit"),
            ("MEND", "mend"),
            ("SERAC", "serac"),
        )
    ),
    *_each(
        "the same key in both places keeps {} from collapsing",
        "edit-world",
        "rome",
        {"rome_release": "ROME"},
        f"{_ROW}.triangle",
    ),
    *_each(
        "AlphaEdit degrades less than {}",
        "edit-world",
        "alphaedit",
        {"rome": "ROME", "memit": "MEMIT"},
        f"{_ROW}.triangle",
        whys={
            "memit": (
                "no direction is free in so small a model: the least eigenvalue of its keys' second moments is a "
                "hundredth of the mean; the projection protects in part, as MEMIT's weight of these moments does"
            )
        },
    ),
)
_SMALLER_STEP = (
    "what ignoring the largest entries does, a smaller step does as well: in so small a model it is spread over many "
    "entries, with and without them, what a text teaches of its own place and what it spreads"
)
_DILUTE = (
    Claim(
        "priming falls with the keyword's probability: a rank correlation of -0.4 or stronger",
        "prime-world",
        "plain",
        "untaught",
        "spearman",
        by=0.4,
    ),
    Claim(
        "what is taught primes by its keyword's probability more than what is only told",
        "prime-world",
        "plain",
        "in_context",
        "spearman",
    ),
    *_each(
        "the keyword's probability foretells priming better than {}",
        "prime-world",
        "plain",
        {"by_loss": "the text's loss", "by_length": "its length", "by_entropy": "the entropy before the keyword"},
        "foretold",
        whys={
            "by_loss": (
                "a text here is one short sentence: its loss is its keyword's for the most part, and tells besides how "
                "new the rest of it is"
            ),
        },
    ),
    *_each(
        "without the largest 8 % of each update a text primes less than {}",
        "prime-world",
        "ignore_8",
        {
            "plain": "with all of it",
            "random_8": "without as much at random",
            "keep_8": "with the largest 8 % alone",
            "slower": "at a smaller rate that remembers as much",
            "shorter": "in fewer steps that remember as much",
            "pulled": "pulled back as far as remembers as much",
        },
        "priming",
        whys={
            "keep_8": (
                "here the many small entries carry more of what spreads: with the largest 8 % alone a text primes less "
                "yet, and is remembered a little less"
            ),
            **dict.fromkeys(("slower", "shorter", "pulled"), _SMALLER_STEP),
        },
    ),
    Claim(
        "without the largest 8 % of each update a text primes half as much or less",
        "prime-world",
        "ignore_8",
        "plain",
        "priming",
        why=(
            "it takes a fifth off, as differences of logarithms: after as few steps on so small a model the other 92 % "
            "learn most of what the largest entries would have"
        ),
        times=0.5,
    ),
    Claim(
        "ignoring the largest 8 % keeps what is taught to its place",
        "prime-world",
        "ignore_8",
        "plain",
        "specificity",
        why="without the largest entries as much is lost of what is remembered as of what is primed",
    ),
    Claim(
        "stepping stones dilute",
        "prime-world",
        "stones",
        "plain",
        "priming",
        why=(
            "a stepping stone says the keyword beforehand, from where the small model has learnt to copy it: it learns "
            "hardly anything of the text's own place, and primes as before"
        ),
    ),
)

_KNOWEDIT = (
    Claim("FT-M teaches what FT-L does not", "edit-tasks", "finetune_m", "finetune_l", "alone.reliability"),
    Claim("SERAC leaves more alone than ROME", "edit-tasks", "serac", "rome", "alone.locality"),
    Claim(
        "MEND leaves more alone than ROME",
        "edit-tasks",
        "mend",
        "rome",
        "alone.locality",
        why=(
            "MEND is trained on 200 facts, and its step changes other facts of the relation as well (locality 0.78 on "
            "exchanged ones); ROME's change, in one direction of the keys, hardly does (0.97)"
        ),
    ),
    *(
        Claim(f"IKE leaves less alone than {name}", "edit-tasks", label, "ike", "alone.locality")
        for name, label in (
            ("FT-M", "finetune_m"),
            ("ROME", "rome"),
            ("MEMIT", "memit"),
            ("MEND", "mend"),
            ("SERAC", "serac"),
        )
    ),
    Claim(
        "FT-M carries further than ROME",
        "edit-tasks",
        "finetune_m",
        "rome",
        "alone.portability",
        why=(
            "both carry next to nothing (0.08 and 0.06, not editing 0.02): more only where the subject has another "
            "name, hardly ever to a second fact, which so small a model does not chain before an edit either"
        ),
    ),
    *(
        Claim(
            f"ROME makes a model forget what {name} does not",
            "edit-tasks",
            "rome",
            label,
            "alone.erasure.gone",
            why=why,
        )
        for name, label, why in (
            ("FT-L", "finetune_l", ""),
            ("MEND", "mend", ""),
            (
                "SERAC",
                "serac",
                (
                    "every method that acts at all takes the old answer away; SERAC's second model answers in its "
                    "place, if with something else than the refusal it was told, as ROME's does"
                ),
            ),
            (
                "LoRA",
                "lora",
                (
                    "a few steps of gradient are enough for so small a model to lose an answer; neither makes it say "
                    "the refusal"
                ),
            ),
        )
    ),
    Claim(
        "where tracing points to is not where editing works best",
        "edit-tasks",
        "rome",
        "rome_traced",
        "alone.triangle",
        why=(
            "in a model of four layers both are the first one, in every seed: over layers, what tracing finds and how "
            "well ROME edits correlate at 0.82 (Spearman's, mean over seeds)"
        ),
    ),
)


SYSTEMS: tuple[System, ...] = (
    System(
        1,
        "Multi-Task Multi-Agent Shared Layers are Universal Cognition of Multi-Agent Coordination",
        2023,
        "https://arxiv.org/abs/2312.15674",
        "act",
    ),
    System(2, "Multitask Vision-Language Prompt Tuning", 2024, "https://arxiv.org/abs/2211.11720", "share"),
    System(
        3,
        "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation",
        2024,
        "https://arxiv.org/abs/2306.04344",
        "adapt",
    ),
    System(
        4,
        "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
        2026,
        "https://arxiv.org/abs/2501.15103",
        "share",
    ),
    System(
        5,
        "DεpS: Delayed ε-Shrinking for Faster Once-For-All Training",
        2024,
        "https://arxiv.org/abs/2407.06167",
        "share",
    ),
    System(
        6,
        "RS-GPT4V: A Unified Multimodal Instruction-Following Dataset for Remote Sensing Image Understanding",
        2024,
        "https://arxiv.org/abs/2406.12479",
        "teach",
    ),
    System(
        7,
        "Decorate the Newcomers: Visual Domain Prompt for Continual Test Time Adaptation",
        2023,
        "https://arxiv.org/abs/2212.04145",
        "adapt",
    ),
    System(
        8,
        "RSBuilding: Towards General Remote Sensing Image Building Extraction and Change Detection with "
        "Foundation Model",
        2024,
        "https://arxiv.org/abs/2403.07564",
        "share",
    ),
    System(
        9,
        "ProKD: An Unsupervised Prototypical Knowledge Distillation Network for Zero-Resource Cross-Lingual "
        "Named Entity Recognition",
        2023,
        "https://arxiv.org/abs/2301.08855",
        "distill",
    ),
    System(
        10,
        "Pre-training Contextualized World Models with In-the-wild Videos for Reinforcement Learning",
        2023,
        "https://arxiv.org/abs/2305.18499",
        "act",
    ),
    System(
        11,
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        2024,
        "https://arxiv.org/abs/2406.15479",
        "merge",
        methods=("merge.twin",),
        claims=_TWIN,
        departures=(
            "The router's checkpoint is chosen on held-out training inputs, where the release takes test data.",
            "The router picks a row's head as well, where the release takes the true task's.",
            "A tensor of more than two dimensions is cut as the matrix [first, all others]; running means have twins.",
        ),
    ),
    System(
        12,
        "Class-relation Knowledge Distillation for Novel Class Discovery",
        2023,
        "https://arxiv.org/abs/2307.09158",
        "distill",
    ),
    System(
        13,
        "FAIR Jupyter: a knowledge graph approach to semantic sharing and granular exploration of a "
        "computational notebook reproducibility dataset",
        2024,
        "https://arxiv.org/abs/2404.12935",
        "graph",
    ),
    System(
        14,
        "m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers",
        2024,
        "https://arxiv.org/abs/2402.16918",
        "distill",
    ),
    System(
        15,
        "Accelerating Scientific Discovery with Generative Knowledge Extraction, Graph-Based Representation, "
        "and Multimodal Intelligent Graph Reasoning",
        2024,
        "https://arxiv.org/abs/2403.11996",
        "harvest",
    ),
    System(
        16,
        "Alt-MoE:A Scalable Framework for Bidirectional Multimodal Alignment and Efficient Knowledge Integration",
        2024,
        "https://arxiv.org/abs/2409.05929",
        "align",
    ),
    System(
        17,
        "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
        2024,
        "https://arxiv.org/abs/2405.14768",
        "edit",
        methods=("edit.wise",),
        claims=_WISE,
        departures=(
            "Excitement and rate are measured in what is usual in the model that is edited; the release's numbers suit "
            "its own models.",
            "In the comparison, every fact has a shard of its own and none is merged, excitement is the last token's, "
            "relative to what goes in, and the ratio is chosen: the mean over tokens is alike for all prompts of so "
            "small a model.",
        ),
    ),
    System(
        18,
        "PoE: a Panel of Experts for Generalized Automatic Dialogue Assessment",
        2023,
        "https://arxiv.org/abs/2212.08992",
        "share",
    ),
    System(
        19,
        "From Grunts to Grammar: Emergent Language from Cooperative Foraging",
        2025,
        "https://arxiv.org/abs/2505.12872",
        "act",
    ),
    System(
        20,
        "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou",
        2024,
        "https://arxiv.org/abs/2408.05430",
        "share",
        methods=("share.home",),
        claims=_HOME,
        departures=(
            "Feature gates are one for each expert group on both levels and start as the identity; "
            "the paper leaves sizes and start open.",
        ),
    ),
    System(
        21, "Large-Vocabulary 3D Diffusion Model with Transformer", 2024, "https://arxiv.org/abs/2309.07920", "draw"
    ),
    System(
        22,
        "UniAP: Towards Universal Animal Perception in Vision via Few-shot Learning",
        2024,
        "https://arxiv.org/abs/2308.09953",
        "see",
    ),
    System(
        23,
        "PromptKD: Unsupervised Prompt Distillation for Vision-Language Models",
        2024,
        "https://arxiv.org/abs/2403.02781",
        "distill",
    ),
    System(
        24, "Scaling Diffusion Transformers to 16 Billion Parameters", 2024, "https://arxiv.org/abs/2407.11633", "draw"
    ),
    System(
        25, "Assessing Language Model Deployment with Risk Cards", 2023, "https://arxiv.org/abs/2303.18190", "probe"
    ),
    System(
        26,
        "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace",
        2025,
        "https://arxiv.org/abs/2410.13910",
        "merge",
        methods=("merge.dam",),
        claims=_DAM,
        departures=(
            "The mask's step leaves no gradient behind for lambda's next step; the release does not clear it.",
            "The final mask is the mean of several draws; the release takes one, and its result hangs on that draw.",
            "In the comparison the mask learns for 300 rounds, where the paper has 1,000.",
        ),
    ),
    System(
        27,
        "FRAug: Tackling Federated Learning with Non-IID Features via Representation Augmentation",
        2023,
        "https://arxiv.org/abs/2205.14900",
        "federate",
    ),
    System(
        28,
        "MADS: Multi-Attribute Document Supervision for Zero-Shot Image Classification",
        2025,
        "https://arxiv.org/abs/2503.06847",
        "see",
    ),
    System(
        29,
        "Feature Distribution Matching for Federated Domain Generalization",
        2022,
        "https://arxiv.org/abs/2203.11635",
        "federate",
    ),
    System(
        30,
        "From MOOC to MAIC: Reshaping Online Teaching and Learning through LLM-driven Agents",
        2024,
        "https://arxiv.org/abs/2409.03512",
        "tutor",
    ),
    System(
        31,
        "What Makes for Text to 360-degree Panorama Generation with Stable Diffusion?",
        2025,
        "https://arxiv.org/abs/2505.22129",
        "draw",
    ),
    System(32, "ViT-Lens: Towards Omni-modal Representations", 2023, "https://arxiv.org/abs/2308.10185", "align"),
    System(
        33,
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        2024,
        "https://arxiv.org/abs/2401.06066",
        "share",
    ),
    System(
        34,
        "Qwen-Audio: Advancing Universal Audio Understanding via Unified Large-Scale Audio-Language Models",
        2023,
        "https://arxiv.org/abs/2311.07919",
        "share",
    ),
    System(
        35,
        "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
        2025,
        "https://arxiv.org/abs/2410.20672",
        "share",
    ),
    System(
        36,
        "AgentMove: A Large Language Model based Agentic Framework for Zero-shot Next Location Prediction",
        2025,
        "https://arxiv.org/abs/2408.13986",
        "recommend",
    ),
    System(
        37,
        "MT4CrossOIE: Multi-stage Tuning for Cross-lingual Open Information Extraction",
        2023,
        "https://arxiv.org/abs/2308.06552",
        "share",
    ),
    System(
        38,
        "Unify, Align and Refine: Multi-Level Semantic Alignment for Radiology Report Generation",
        2023,
        "https://arxiv.org/abs/2303.15932",
        "align",
    ),
    System(
        39,
        "Fast & Slow Learning: Incorporating Synthetic Gradients in Neural Memory Controllers",
        2020,
        "https://arxiv.org/abs/2011.05438",
        "remember",
    ),
    System(
        40,
        "Does Continual Learning Equally Forget All Parameters?",
        2023,
        "https://arxiv.org/abs/2304.04158",
        "remember",
    ),
    System(
        41,
        "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization",
        2023,
        "https://arxiv.org/abs/2308.04699",
        "federate",
    ),
    System(
        42,
        "Towards Unified Conversational Recommender Systems via Knowledge-Enhanced Prompt Learning",
        2022,
        "https://arxiv.org/abs/2206.09363",
        "recommend",
    ),
    System(
        43,
        "MechGPT, a language-based strategy for mechanics and materials modeling that connects knowledge "
        "across scales, disciplines and modalities",
        2024,
        "https://arxiv.org/abs/2310.10445",
        "teach",
    ),
    System(
        44,
        "A Systematic Literature Review of Automated ICD Coding and Classification Systems using Discharge Summaries",
        2021,
        "https://arxiv.org/abs/2107.10652",
        "label",
    ),
    System(
        45,
        "Distinguishing Ignorance from Error in LLM Hallucinations",
        2024,
        "https://arxiv.org/abs/2410.22071",
        "probe",
    ),
    System(
        46,
        "CooK: Empowering General-Purpose Language Models with Modular and Collaborative Knowledge",
        2024,
        "https://arxiv.org/abs/2305.09955",
        "ask",
    ),
    System(
        47, "Establishing Knowledge Preference in Language Models", 2024, "https://arxiv.org/abs/2407.13048", "probe"
    ),
    System(
        48,
        "Kuaipedia: a Large-scale Multi-modal Short-video Encyclopedia",
        2022,
        "https://arxiv.org/abs/2211.00732",
        "harvest",
    ),
    System(
        49,
        "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws",
        2025,
        "https://arxiv.org/abs/2404.05405",
        "probe",
    ),
    System(
        50,
        "Experiments with Large Language Models on Retrieval-Augmented Generation for Closed-Source "
        "Simulation Software",
        2025,
        "https://arxiv.org/abs/2502.03916",
        "ask",
    ),
    System(
        51,
        "A Unified Generative Retriever for Knowledge-Intensive Language Tasks via Prompt Learning",
        2023,
        "https://arxiv.org/abs/2304.14856",
        "ask",
    ),
    System(
        52,
        "Unifying Large Language Models and Knowledge Graphs: A Roadmap",
        2024,
        "https://arxiv.org/abs/2306.08302",
        "graph",
    ),
    System(
        53,
        "Knowledge Solver: Teaching LLMs to Search for Domain Knowledge from Knowledge Graphs",
        2023,
        "https://arxiv.org/abs/2309.03118",
        "ask",
    ),
    System(
        54,
        "Joint Reasoning on Hybrid-knowledge sources for Task-Oriented Dialog",
        2023,
        "https://arxiv.org/abs/2210.07295",
        "ask",
    ),
    System(
        55,
        "Benchmarking Knowledge-driven Zero-shot Learning",
        2023,
        "https://doi.org/10.1016/j.websem.2022.100757",
        "link",
    ),
    System(
        56,
        "Integrating Knowledge Graph embedding and pretrained Language Models in Hypercomplex Spaces",
        2023,
        "https://arxiv.org/abs/2208.02743",
        "link",
    ),
    System(
        57,
        "CREAK: A Dataset for Commonsense Reasoning over Entity Knowledge",
        2021,
        "https://arxiv.org/abs/2109.01653",
        "probe",
    ),
    System(
        58,
        "ChroKnowledge: Unveiling Chronological Knowledge of Language Models in Multiple Domains",
        2025,
        "https://arxiv.org/abs/2410.09870",
        "probe",
    ),
    System(59, "Inside-Out: Hidden Factual Knowledge in LLMs", 2025, "https://arxiv.org/abs/2503.15299", "probe"),
    System(
        60,
        "EasyEdit: An Easy-to-use Knowledge Editing Framework for Large Language Models",
        2024,
        "https://arxiv.org/abs/2308.07269",
        "edit",
        methods=_EDITORS,
        claims=_EASYEDIT,
        departures=(
            "ROME's mean key stands in both places; its release has the bare prompt's in one.",
            "Second moments are drawn towards their diagonal as far as their sample is small.",
            "An answer is looked at in three ways (whole and greedy, token by token behind right ones, drawn); "
            "EasyEdit's score is the second.",
        ),
    ),
    System(
        61,
        "Large Language Models Struggle to Learn Long-Tail Knowledge",
        2023,
        "https://arxiv.org/abs/2211.08411",
        "probe",
    ),
    System(
        62,
        "DiffKG: Knowledge Graph Diffusion Model for Recommendation",
        2024,
        "https://arxiv.org/abs/2312.16890",
        "recommend",
    ),
    System(63, "SciPIP: An LLM-based Scientific Paper Idea Proposer", 2024, "https://arxiv.org/abs/2410.23166", "ask"),
    System(
        64,
        "Language Specific Knowledge: Do Models Know Better in X than in English?",
        2025,
        "https://arxiv.org/abs/2505.14990",
        "probe",
    ),
    System(
        65,
        "Harnessing Large Language Models for Knowledge Graph Question Answering via Adaptive Multi-Aspect "
        "Retrieval-Augmentation",
        2025,
        "https://arxiv.org/abs/2412.18537",
        "ask",
    ),
    System(
        66, "A Change Language for Ontologies and Knowledge Graphs", 2025, "https://arxiv.org/abs/2409.13906", "graph"
    ),
    System(
        67,
        "torchdistill: A Modular, Configuration-Driven Framework for Knowledge Distillation",
        2021,
        "https://arxiv.org/abs/2011.12913",
        "distill",
    ),
    System(
        68,
        "Progressive Collaborative and Semantic Knowledge Fusion for Generative Recommendation",
        2025,
        "https://arxiv.org/abs/2502.06269",
        "recommend",
    ),
    System(
        69,
        "BertNet: Harvesting Knowledge Graphs with Arbitrary Relations from Pretrained Language Models",
        2023,
        "https://arxiv.org/abs/2206.14268",
        "harvest",
    ),
    System(
        70,
        "Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication",
        2023,
        "https://arxiv.org/abs/2310.03188",
        "distill",
    ),
    System(
        71,
        "Bidirectional LMs are Better Knowledge Memorizers? A Benchmark for Real-world Knowledge Injection",
        2025,
        "https://arxiv.org/abs/2505.12306",
        "teach",
    ),
    System(
        72,
        "A Comprehensive Study of Knowledge Editing for Large Language Models",
        2024,
        "https://arxiv.org/abs/2401.01286",
        "edit",
        methods=_EDITORS,
        claims=_KNOWEDIT,
        departures=(
            "The six tasks are made from a table of facts; in the place of sentiment, one topic is to be praised.",
            "Texts that a model makes up are ended by one fact, not by whole sentences.",
        ),
    ),
    System(
        73,
        "Symbolic Knowledge Distillation: from General Language Models to Commonsense Models",
        2022,
        "https://arxiv.org/abs/2110.07178",
        "teach",
    ),
    System(
        74,
        "How new data permeates LLM knowledge and how to dilute it",
        2025,
        "https://arxiv.org/abs/2504.09522",
        "edit",
        methods=("edit.dilute",),
        claims=_DILUTE,
        departures=(
            "Outlandish is not used: texts and stepping stones are made from a table of facts, or were written for "
            "koinon.",
        ),
    ),
    System(
        75,
        "KGQuiz: Evaluating the Generalization of Encoded Knowledge in Large Language Models",
        2024,
        "https://arxiv.org/abs/2310.09725",
        "probe",
    ),
    System(
        76,
        "Effective Transfer Learning for Identifying Similar Questions: Matching User Questions to COVID-19 FAQs",
        2020,
        "https://arxiv.org/abs/2008.13546",
        "ask",
    ),
    System(77, "Deep Knowledge Tracing with Learning Curves", 2020, "https://arxiv.org/abs/2008.01169", "tutor"),
    System(
        78,
        "Prefix Conditioning Unifies Language and Label Supervision",
        2023,
        "https://arxiv.org/abs/2206.01125",
        "share",
    ),
    System(
        79,
        "Search-in-the-Chain: Towards Accurate, Credible and Traceable Large Language Models for "
        "Knowledge-intensive Tasks",
        2024,
        "https://arxiv.org/abs/2304.14732",
        "ask",
    ),
    System(
        80,
        "KeNet:Knowledge-enhanced Doc-Label Attention Network for Multi-label text classification",
        2024,
        "https://arxiv.org/abs/2403.01767",
        "label",
    ),
    System(
        81,
        "O1 Replication Journey: A Strategic Progress Report -- Part 1",
        2024,
        "https://arxiv.org/abs/2410.18982",
        "teach",
    ),
)


def system(number: int) -> System:
    """The row with this number; raises KeyError if there is none."""
    for row in SYSTEMS:
        if row.number == number:
            return row
    raise KeyError(number)
