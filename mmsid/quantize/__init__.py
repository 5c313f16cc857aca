"""Residual quantizers of embeddings (balanced residual k-means, RQ-KMeans, RQ-VAE), and behaviour vectors."""

from mmsid.quantize.balanced import FitResult, balanced_residual_kmeans
from mmsid.quantize.behaviour import CoEngagementFactors, fuse, ppmi_svd
from mmsid.quantize.codebooks import ResidualCodebooks
from mmsid.quantize.fit import Quantizer, fit_quantizer
from mmsid.quantize.rqkmeans import rq_kmeans
from mmsid.quantize.rqvae import RqVaeFit, rq_vae
from mmsid.quantize.scores import CodebookScores

__all__ = [
    "CoEngagementFactors",
    "CodebookScores",
    "FitResult",
    "Quantizer",
    "ResidualCodebooks",
    "RqVaeFit",
    "balanced_residual_kmeans",
    "fit_quantizer",
    "fuse",
    "ppmi_svd",
    "rq_kmeans",
    "rq_vae",
]
