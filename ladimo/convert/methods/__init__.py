"""The conversion methods, one module or package each. To add one, import its module here: it registers itself."""

from ladimo.convert.methods import cmoe, ladimo, moefication, nested, static
from ladimo.convert.methods.elastic import method as elastic

BUILT_IN = (ladimo, moefication, cmoe, static, elastic, nested)
