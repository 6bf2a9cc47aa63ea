"""Plans of runs before there is a machine for them, and what they need to know of one."""

from tools.plan.command import main as main
from tools.plan.memory import at_stage as at_stage
from tools.plan.memory import row as row
