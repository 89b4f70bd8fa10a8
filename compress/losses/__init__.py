"""Distillation losses: functions of tensors, in pure torch."""

from compress.losses.balanced import AdaptiveKL, BalancedKL, EntropyGatedKL, TokenwiseKL
from compress.losses.base import IGNORED, ClosedFormLoss, Loss, Needs, Outputs, TokenLoss
from compress.losses.clipped import ClippedKL
from compress.losses.correlation import Dist
from compress.losses.decoupled import DecoupledKD, NormalisedKD, UniversalSelfKD
from compress.losses.divergence import Distributions, Divergence
from compress.losses.f_divergence import FDivergence
from compress.losses.features import ClassMeans, NormDirection, class_means
from compress.losses.kl import KL, ReverseKL, SymmetricKL
from compress.losses.labels import CrossEntropy
from compress.losses.mixtures import JensenShannon, ReverseSkewKL, SkewKL
from compress.losses.mutual_information import ConditionalMutualInformation
from compress.losses.one_for_all import BranchedOneForAll, OneForAll, StagedOneForAll
from compress.losses.plackett_luce import PlackettLuce
from compress.losses.power import Alpha, AlphaBeta, ChiSquare, Renyi, TotalVariation
from compress.losses.registry import Setting, loss_class, loss_names, loss_options, make_loss
from compress.losses.sinkhorn import Sinkhorn
from compress.losses.spans import ChunkSpans, FixedSpans, PunctuationSpans, SpanCorrelation, SpanSource
from compress.losses.sparse import SparseTarget, sampled_target, top_k_target
from compress.losses.subclasses import LELP, PseudoSubclasses, class_logits
from compress.losses.targets import SampledKL, TopKKL
from compress.losses.uld import UniversalLogit

__all__ = [
    "IGNORED",
    "KL",
    "LELP",
    "AdaptiveKL",
    "Alpha",
    "AlphaBeta",
    "BalancedKL",
    "BranchedOneForAll",
    "ChiSquare",
    "ChunkSpans",
    "ClassMeans",
    "ClippedKL",
    "ClosedFormLoss",
    "ConditionalMutualInformation",
    "CrossEntropy",
    "DecoupledKD",
    "Dist",
    "Distributions",
    "Divergence",
    "EntropyGatedKL",
    "FDivergence",
    "FixedSpans",
    "JensenShannon",
    "Loss",
    "Needs",
    "NormDirection",
    "NormalisedKD",
    "OneForAll",
    "Outputs",
    "PlackettLuce",
    "PseudoSubclasses",
    "PunctuationSpans",
    "Renyi",
    "ReverseKL",
    "ReverseSkewKL",
    "SampledKL",
    "Setting",
    "Sinkhorn",
    "SkewKL",
    "SpanCorrelation",
    "SpanSource",
    "SparseTarget",
    "StagedOneForAll",
    "SymmetricKL",
    "TokenLoss",
    "TokenwiseKL",
    "TopKKL",
    "TotalVariation",
    "UniversalLogit",
    "UniversalSelfKD",
    "class_logits",
    "class_means",
    "loss_class",
    "loss_names",
    "loss_options",
    "make_loss",
    "sampled_target",
    "top_k_target",
]
