"""`rljax view`: run folders in a browser. Needs the standard library alone, so that it opens at once."""

from rljax.viewer.alarms import Alarm, find_alarms
from rljax.viewer.answers import Answers
from rljax.viewer.export import export
from rljax.viewer.forest import Forest, lay_out
from rljax.viewer.server import open_server
from rljax.viewer.texts import metric_texts

__all__ = ["Alarm", "Answers", "Forest", "export", "find_alarms", "lay_out", "metric_texts", "open_server"]
