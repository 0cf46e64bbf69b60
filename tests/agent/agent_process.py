"""An agent in a process of its own, with fake workers: `agent_process.py HOME`."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.daemon import Settings, run
from agent.home import Home
from protos.wire import Identity

home = Home(root=Path(sys.argv[1]))
worker = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
run(home, Identity.load(home.identity), Settings(worker_command=worker, gpus=()))
