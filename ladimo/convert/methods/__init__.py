"""The conversion methods, one module or package each. A module registers its method when it is imported here."""

from ladimo.convert.methods import cmoe, ladimo, moefication, nested, static
from ladimo.convert.methods.elastic import method as elastic
from ladimo.convert.methods.masks import method as masks

BUILT_IN = (ladimo, moefication, cmoe, static, elastic, nested, masks)
