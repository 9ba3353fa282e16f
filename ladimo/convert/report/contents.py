"""Makes a report's document from its record. Sections without data are left out.

Every number comes from the record. In tables, rows are layers and columns are policies.
"""

from ladimo.convert.policies.choose import NAMED
from ladimo.convert.report.conditions import conditions_section
from ladimo.convert.report.document import Document, MethodView
from ladimo.convert.report.layers import depth_section, layers_section, parameters_section
from ladimo.convert.report.outside import comparison_section, tasks_section, throughput_section
from ladimo.convert.report.overview import frontier_section, lead, policies_section, tile
from ladimo.convert.report.record import Report
from ladimo.convert.report.routing import routing_section
from ladimo.convert.report.training import training_section


def document(report: Report, view: MethodView) -> Document:
    """The document of a report. view: the part of the conversion method."""
    made = [
        frontier_section(report),
        policies_section(report),
        tasks_section(report),
        comparison_section(report),
        throughput_section(report),
        parameters_section(report, view),
        layers_section(report, view),
        training_section(report, view),
        depth_section(report),
        routing_section(report),
        conditions_section(report),
    ]
    return Document(
        title=f"{report.model}: conversion report",
        lead=[*lead(report), *view.lead],
        tiles=[tile(entry) for name in NAMED for entry in report.policies if entry.policy == name],
        sections=[section for section in made if section is not None],
    )
