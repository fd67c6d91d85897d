"""This file is where the record of campaigns is tested, on SQLite and on a PostgreSQL server."""

import gc
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from cluster.errors import SystemFailure, UserError
from orchestrator import database, migrations
from orchestrator.claims import ClaimLost
from orchestrator.ledger import Ledger, ledger_uri
from orchestrator.records import Change, NewRun
from orchestrator.tables import METADATA, REVISION

REASON = {"what": "the photo is broken", "seen": "a \x00 in it", "do": "replace it", "kind": "bad_input"}
PATIENCE_S = 300  # on a machine that is busy elsewhere
MANIFEST = {"prompts": ["a photo of {subject}"], "budget": {"hours": 1}}


def new(name, steps=100, tenant="acme", priority=0, reason=None, **spec):
    recipe = {"train": {"steps": steps}, **spec} if reason is None else None
    return NewRun(name, "dog", tenant, priority, steps, recipe, reason)


def enroll(ledger, *runs, name="pets", storage="/data"):
    return ledger.enroll(name, storage, MANIFEST, runs)


def states(ledger, name="pets"):
    return {run.name: run.state for run in ledger.runs(name)}


def set_all(ledger, claim, **fields):
    ledger.record(claim, [Change(run.id, fields) for run in ledger.runs("pets")])


def another_process(code, *args, **kinds):
    """A Python that runs `code`, with what it needs of this checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=Path(database.__file__).parents[1], text=True, **kinds
    )


HOLD = """
import sys, time
from orchestrator.ledger import Ledger
claim = Ledger(sys.argv[1]).claim("pets", float(sys.argv[2])).__enter__()
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(uri, ledger):
    """Start a process that holds the campaign; it is killed in the end."""
    started = []

    def start(ttl_s):
        process = another_process(HOLD, uri, str(ttl_s), stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# enrolment


def test_a_campaign_is_on_record_with_its_runs(ledger):
    done = enroll(
        ledger, new("rex"), new("tom", steps=400, tenant="zoo", priority=2, base={"model": "pocket"})
    )

    assert (done.added, done.changed, done.kept, done.dropped) == (["rex", "tom"], [], [], [])
    campaign = ledger.campaign("pets")
    assert (campaign.storage_uri, campaign.state, campaign.manifest) == ("/data", "queued", MANIFEST)
    assert abs(campaign.created_at - time.time()) < 60
    assert ledger.campaigns() == [campaign]
    [rex, tom] = ledger.runs("pets")
    assert (rex.position, rex.name, rex.state, rex.step, rex.attempts, rex.reason) == (
        0,
        "rex",
        "queued",
        0,
        0,
        None,
    )
    assert (tom.position, tom.steps, tom.tenant, tom.priority) == (1, 400, "zoo", 2)
    assert ledger.spec(tom.id) == {"train": {"steps": 400}, "base": {"model": "pocket"}}
    assert ledger.specs([rex.id, tom.id]).keys() == {rex.id, tom.id}
    assert [moment.state for moment in ledger.history(rex.id)] == ["queued"]
    assert ledger.counts("pets") == {"queued": 2}


def test_a_mistaken_row_is_enrolled_as_failed(ledger):
    enroll(ledger, new("rex"), new("bad", reason=REASON))

    [bad] = ledger.runs("pets", "failed")
    assert (bad.name, bad.reason) == ("bad", REASON)
    assert bad.finished_at
    assert ledger.counts("pets") == {"queued": 1, "failed": 1}
    with pytest.raises(KeyError):
        ledger.spec(bad.id)


def test_enrolling_again_adds_what_is_new_and_starts_what_changed_afresh(ledger):
    enroll(ledger, new("rex"), new("tom"), new("bad", reason=REASON), new("old"))
    with ledger.claim("pets") as claim:
        set_all(ledger, claim, state="succeeded", version="v1", attempts=2, width=4, metrics={"loss": 0.5})

    done = enroll(ledger, new("tom", steps=500), new("rex", tenant="zoo"), new("bad"), new("ivy"))

    assert (done.added, done.changed, done.kept, done.dropped) == (["ivy"], ["tom", "bad"], ["rex"], ["old"])
    runs = {run.name: run for run in ledger.runs("pets")}
    assert list(runs) == ["tom", "rex", "bad", "ivy", "old"]
    tom, rex = runs["tom"], runs["rex"]
    assert (tom.state, tom.attempts, tom.version, tom.width, tom.steps) == ("queued", 0, None, None, 500)
    assert (rex.state, rex.attempts, rex.version, rex.tenant) == ("succeeded", 2, "v1", "zoo")
    assert rex.metrics == {"loss": 0.5}
    assert (runs["bad"].state, runs["bad"].reason) == ("queued", None)
    assert ledger.spec(tom.id)["train"] == {"steps": 500}
    assert [moment.state for moment in ledger.history(tom.id)] == ["queued", "succeeded", "queued"]


def test_some_runs_of_a_state_are_those_that_ended_last_or_come_first(ledger):
    enroll(ledger, *(new(f"s{i}") for i in range(6)))
    with ledger.claim("pets") as claim:
        for ended in (3, 1, 2):
            run = ledger.runs("pets")[ended]
            ledger.record(claim, [Change(run.id, {"state": "succeeded"})])
            time.sleep(0.01)

    def names(state, most):
        return [run.name for run in ledger.runs("pets", state, most)]

    assert names("succeeded", 2) == ["s1", "s2"]
    assert names("queued", 2) == ["s0", "s4"]
    assert names("queued", 9) == ["s0", "s4", "s5"]


def test_the_order_of_a_recipes_settings_changes_nothing(ledger):
    enroll(ledger, NewRun("rex", "dog", "acme", 0, 1, {"a": 1, "b": {"c": 2, "d": 3}}))

    done = enroll(ledger, NewRun("rex", "dog", "acme", 0, 1, {"b": {"d": 3, "c": 2}, "a": 1}))

    assert done.kept == ["rex"]


def test_a_campaigns_name_is_taken_in_another_storage(ledger):
    enroll(ledger, new("rex"))

    with pytest.raises(UserError, match=r"another storage.*it is in /data, this one would be in s3://b"):
        enroll(ledger, new("tom"), storage="s3://b")
    assert states(ledger) == {"rex": "queued"}


def test_a_subject_listed_twice_enrolls_nothing(ledger):
    with pytest.raises(UserError, match=r"lists subjects twice\. rex"):
        enroll(ledger, new("rex"), new("tom"), new("rex"))
    assert ledger.campaigns() == []


def test_an_unknown_campaign_is_named_with_the_nearest_known_one(ledger):
    with pytest.raises(UserError, match="run one first"):
        ledger.campaign("pets")
    enroll(ledger, new("rex"))
    with pytest.raises(UserError, match=r"no campaign pest\. .*did you mean pets\?"):
        ledger.claim("pest")


def test_campaigns_do_not_mix(ledger):
    enroll(ledger, new("rex"))
    enroll(ledger, new("rex"), new("tom"), name="more")
    [rex] = ledger.runs("pets")

    with ledger.claim("more") as claim, pytest.raises(ValueError, match=f"no run {rex.id}"):
        ledger.record(claim, [Change(rex.id, {"state": "failed"})])
    ledger.delete("more")

    assert [campaign.name for campaign in ledger.campaigns()] == ["pets"]
    assert ledger.runs("more") == []
    assert states(ledger) == {"rex": "queued"}


# changes


def test_changes_are_recorded_together_and_a_new_state_enters_the_history(ledger):
    enroll(ledger, new("rex"), new("tom"))
    [rex, tom] = ledger.runs("pets")
    with ledger.claim("pets") as claim:
        ledger.record(
            claim,
            [
                Change(rex.id, {"state": "preparing", "phase": "reading photos", "started_at": 5.5}),
                Change(rex.id, {"state": "training", "phase": None, "attempts": 1, "gang": "gang-1"}),
                Change(tom.id, {"state": "failed", "reason": REASON}),
                Change(rex.id, {"step": 10, "rate": 2.5, "loss_subject": math.nan, "loss_class": 0.25}),
            ],
        )
        ledger.record_campaign(claim, state="running", cpu_seconds=4.0, worker_seconds=1.5)

    [rex, tom] = ledger.runs("pets")
    assert (rex.state, rex.phase, rex.attempts, rex.gang, rex.step) == ("training", None, 1, "gang-1", 10)
    assert (rex.rate, rex.loss_subject, rex.loss_class, rex.started_at) == (2.5, None, 0.25, 5.5)
    assert tom.reason == REASON
    told = [(moment.state, moment.phase, moment.attempt) for moment in ledger.history(rex.id)]
    assert told == [("queued", None, 0), ("preparing", "reading photos", 0), ("training", None, 1)]
    assert ledger.history(tom.id)[-1].reason == REASON
    campaign = ledger.campaign("pets")
    assert (campaign.state, campaign.cpu_seconds, campaign.worker_seconds) == ("running", 4.0, 1.5)


def test_a_change_that_cannot_be_leaves_everything_as_it_was(ledger):
    enroll(ledger, new("rex"))
    [rex] = ledger.runs("pets")
    wrong = [{"state": "done"}, {"colour": "red"}, {"id": 7}, {"name": "tom"}]
    with ledger.claim("pets") as claim:
        for fields in wrong:
            with pytest.raises(ValueError):
                ledger.record(claim, [Change(rex.id, {"step": 5}), Change(rex.id, fields)])
        with pytest.raises(ValueError):
            ledger.record_campaign(claim, name="other")

    assert ledger.runs("pets") == [rex]


def test_runs_are_read_by_state(ledger):
    enroll(ledger, new("rex"), new("tom"), new("bad", reason=REASON))
    with ledger.claim("pets") as claim:
        ledger.record(claim, [Change(ledger.runs("pets")[1].id, {"state": "training"})])

    assert [run.name for run in ledger.runs("pets", ("queued", "failed"))] == ["rex", "bad"]
    assert [run.name for run in ledger.runs("pets", "training")] == ["tom"]
    assert ledger.runs("pets", ()) == []


# claims


def test_a_second_controller_is_refused_and_told_who_holds_the_campaign(ledger, holder):
    enroll(ledger, new("rex"))
    process = holder(30)

    with pytest.raises(UserError, match=f"campaign pets is being run already. by process {process.pid} on "):
        ledger.claim("pets")
    with pytest.raises(UserError, match="subjects cannot be changed meanwhile"):
        enroll(ledger, new("rex"), new("tom"))
    with pytest.raises(UserError, match="cannot be forgotten"):
        ledger.delete("pets")
    assert ledger.campaign("pets").owner["pid"] == process.pid


@pytest.mark.faults
def test_a_controller_that_was_killed_here_need_not_be_waited_for(ledger, holder):
    enroll(ledger, new("rex"))
    process = holder(600)

    process.send_signal(signal.SIGKILL)  # and nobody has waited for it yet
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)

    with ledger.claim("pets") as claim:
        ledger.record(claim, [])


def test_a_controller_elsewhere_keeps_the_campaign_for_as_long_as_it_said(ledger, monkeypatch):
    enroll(ledger, new("rex"))
    monkeypatch.setattr("cluster.owner.socket.gethostname", lambda: "elsewhere")
    lost = ledger.claim("pets", ttl_s=300)
    monkeypatch.undo()
    with pytest.raises(UserError, match="on elsewhere"):
        ledger.claim("pets")

    engine = _engine(ledger.uri)
    with engine.begin() as connection:  # as if the time had passed
        connection.execute(text("UPDATE claims SET heartbeat_at = heartbeat_at - 300"))
    engine.dispose()

    with ledger.claim("pets") as claim:
        for act in (
            lost.renew,
            lambda: ledger.record(lost, []),
            lambda: ledger.record_campaign(lost, state="failed"),
        ):
            with pytest.raises(ClaimLost, match="no longer held by this controller"):
                act()
        assert lost.lost
        lost.release()  # does not take it from the other
        ledger.record(claim, [])
        assert not claim.lost


def test_a_claim_renews_itself(ledger):
    enroll(ledger, new("rex"))
    with ledger.claim("pets", ttl_s=3) as claim:
        before = ledger.campaign("pets").heartbeat_at
        until = time.monotonic() + PATIENCE_S
        while ledger.campaign("pets").heartbeat_at == before:
            assert time.monotonic() < until and not claim.lost
            time.sleep(0.02)
        with pytest.raises(UserError, match="being run already"):
            ledger.claim("pets")
    assert ledger.campaign("pets").owner is None


def test_only_one_of_many_gets_the_campaign(uri, ledger):
    enroll(ledger, new("rex"))
    won, refused = [], []

    def try_it():
        try:
            won.append(ledger.claim("pets"))
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(won), len(refused)) == (1, 7)


def test_a_lost_claim_travels_between_processes():
    error = ClaimLost("lost", "seen", "do")

    assert str(pickle.loads(pickle.dumps(error))) == "lost. seen. do"
    assert error.exit_code == 1


# wishes


def test_without_a_controller_cancelling_is_done_at_once(ledger):
    enroll(ledger, new("rex"), new("tom"), new("bad", reason=REASON))

    asked = ledger.ask("pets", "cancel", ["rex"])

    assert (asked.names, asked.holder) == (["rex"], None)
    assert states(ledger) == {"rex": "cancelled", "tom": "queued", "bad": "failed"}
    assert ledger.campaign("pets").state == "queued"
    assert ledger.runs("pets")[0].reason["do"].endswith("raybooth campaign retry pets")

    assert ledger.ask("pets", "cancel").names == ["tom"]
    assert states(ledger)["bad"] == "failed"
    assert ledger.campaign("pets").state == "cancelled"
    assert ledger.ask("pets", "cancel").names == []


def test_a_controller_is_told_what_is_asked(ledger):
    enroll(ledger, new("rex"), new("tom"), new("bad", reason=REASON))
    [rex, tom, _] = ledger.runs("pets")
    with ledger.claim("pets") as claim:
        asked = ledger.ask("pets", "cancel", ["tom", "bad"])
        assert asked.names == ["tom"]
        assert asked.holder.startswith(f"process {os.getpid()} on ")
        ledger.ask("pets", "cancel")
        set_all(ledger, claim, state="failed")
        assert ledger.requeue("pets", ["rex"]) == ["rex"]

        wishes = ledger.wishes(claim)

        assert [(w.wish, w.run_ids) for w in wishes] == [
            ("cancel", [tom.id]),
            ("cancel", None),
            ("requeue", [rex.id]),
        ]
        assert states(ledger)["rex"] == "queued"
        ledger.done(claim, [wishes[0].id, wishes[1].id])
        assert [w.wish for w in ledger.wishes(claim)] == ["requeue"]


@pytest.mark.faults
def test_what_was_asked_of_a_controller_that_was_killed_is_done_by_the_next(ledger, holder):
    enroll(ledger, new("rex"), new("tom"))
    process = holder(600)
    assert ledger.ask("pets", "cancel", ["tom"]).holder
    process.kill()
    process.wait()

    with ledger.claim("pets") as claim:
        assert states(ledger) == {"rex": "queued", "tom": "cancelled"}
        assert ledger.wishes(claim) == []


def test_what_was_asked_too_late_is_done_when_the_controller_lets_go(ledger):
    enroll(ledger, new("rex"))
    with ledger.claim("pets"):
        ledger.ask("pets", "cancel")
        assert states(ledger) == {"rex": "queued"}
    assert states(ledger) == {"rex": "cancelled"}


def test_failed_and_cancelled_runs_are_queued_again_where_they_were(ledger):
    enroll(ledger, *map(new, ("rex", "tom", "ivy")), new("bad", reason=REASON))
    with ledger.claim("pets") as claim:
        facts = {
            "version": "v1",
            "step": 40,
            "attempts": 3,
            "kills": 2,
            "width": 4,
            "group_no": 0,
            "finished_at": 5.0,
        }
        set_all(ledger, claim, **facts, state="succeeded")
        for name, state in (("rex", "failed"), ("tom", "cancelled"), ("bad", "failed")):
            [run] = [run for run in ledger.runs("pets") if run.name == name]
            ledger.record(claim, [Change(run.id, {"state": state, "reason": REASON})])
        ledger.record_campaign(claim, state="failed", finished_at=7.0)

    with pytest.raises(UserError, match="ivy is succeeded, bad has no recipe"):
        ledger.requeue("pets", ["rex", "ivy", "bad"])
    assert ledger.requeue("pets") == ["rex", "tom"]

    [rex, tom, ivy, bad] = ledger.runs("pets")
    assert (rex.state, rex.attempts, rex.kills, rex.reason, rex.finished_at) == ("queued", 0, 0, None, None)
    assert (rex.version, rex.step, rex.width, rex.group_no) == ("v1", 40, 4, 0)
    assert (tom.state, ivy.state, bad.state) == ("queued", "succeeded", "failed")
    assert (ledger.campaign("pets").state, ledger.campaign("pets").finished_at) == ("queued", None)


def test_a_run_that_is_asked_about_must_be_there(ledger):
    enroll(ledger, new("rex"))
    with pytest.raises(UserError, match=r"no subject rax. did you mean rex\?"):
        ledger.ask("pets", "cancel", ["rex", "rax"])
    with pytest.raises(UserError, match="no campaign dogs"):
        ledger.requeue("dogs")


# the database


OPEN = """
import sys
from orchestrator.ledger import Ledger
from orchestrator.records import NewRun
sys.stdin.readline()
with Ledger(sys.argv[1]) as ledger:
    ledger.enroll(f"c{sys.argv[2]}", "/data", {}, [NewRun("rex", "dog", "t", 0, 1, {})])
"""


def test_four_processes_open_a_fresh_ledger_at_once(uri):
    processes = [
        another_process(OPEN, uri, str(i), stdin=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(4)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]

    assert [process.returncode for process in processes] == [0] * 4, said
    with Ledger(uri) as ledger:
        assert sorted(campaign.name for campaign in ledger.campaigns()) == ["c0", "c1", "c2", "c3"]


def _engine(uri):
    return create_engine(uri.replace("postgresql:", "postgresql+psycopg:"))


FIRST = """
INSERT INTO campaigns VALUES ('pets', '/data', 'running', NULL, '{"budget": 1}', 1.5, NULL, 2.5, 4, 0, 'm1');
INSERT INTO claims VALUES ('pets', NULL, NULL, NULL);
INSERT INTO runs (id, campaign, position, name, class_noun, tenant, priority, steps, digest, state, step,
  attempts, kills, smaller, prior_drawn, metrics)
  VALUES (7, 'pets', 0, 'rex', 'dog', 'acme', 1, 100, 'd', 'succeeded', 100, 1, 0, 0, 32, '{"loss": 0.5}');
INSERT INTO specs VALUES (7, '{"train": {"steps": 100}}');
INSERT INTO history (run_id, at, state, attempt) VALUES (7, 3.5, 'succeeded', 1);
"""


def test_a_ledger_of_the_first_schema_is_brought_up_to_date_with_its_data(uri):
    engine = _engine(uri)
    with engine.begin() as connection:
        assert database.upgrade(connection, "0001")
        for statement in filter(str.strip, FIRST.split(";\n")):
            connection.exec_driver_sql(statement)
    engine.dispose()

    with Ledger(uri) as ledger:
        campaign, [rex] = ledger.campaign("pets"), ledger.runs("pets")
        assert (campaign.manifest, campaign.cpu_seconds, campaign.worker_seconds) == ({"budget": 1}, 4.0, 2.5)
        assert (rex.id, rex.state, rex.metrics, rex.prior_drawn) == (7, "succeeded", {"loss": 0.5}, 32)
        assert ledger.spec(7) == {"train": {"steps": 100}}
        assert [moment.at for moment in ledger.history(7)] == [3.5]


def test_the_migrations_make_the_tables_that_the_code_names(uri):
    Ledger(uri).close()
    engine = _engine(uri)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == REVISION
    engine.dispose()


NEXT = """
import sqlalchemy as sa
from alembic import op
revision = "next"
down_revision = "{last}"

def upgrade():
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("colour", sa.Text, nullable=False, server_default="red"))
"""


def test_a_later_migration_keeps_the_data_and_older_code_refuses_what_it_made(uri, tmp_path):
    with Ledger(uri) as ledger:
        enroll(ledger, new("rex"))
    later = tmp_path / "later"
    shutil.copytree(Path(migrations.__file__).parent, later)
    (later / "versions" / "next.py").write_text(NEXT.format(last=REVISION))
    engine = _engine(uri)

    with engine.begin() as connection:
        assert database.upgrade(connection, migrations=later)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT name, colour FROM runs")).all() == [("rex", "red")]
        assert connection.execute(text("SELECT count(*) FROM specs")).scalar() == 1
    engine.dispose()

    with pytest.raises(
        UserError, match=f"newer raybooth. its schema is next, this one knows up to {REVISION}"
    ) as told:
        Ledger(uri)
    assert "not-to-be-shown" not in str(told.value)


def test_a_ledger_outlives_a_restart_of_its_server(postgres):
    with Ledger(postgres.new()) as ledger:
        enroll(ledger, new("rex"))
        with ledger.claim("pets") as claim:
            postgres.stop()
            again = threading.Timer(0.5, postgres.start)
            again.start()
            ledger.record(claim, [Change(ledger.runs("pets")[0].id, {"state": "training"})])
            again.join()
        assert states(ledger) == {"rex": "training"}


def test_a_server_that_does_not_answer_is_told_without_its_password(postgres):
    gone = postgres.new().replace(f":{postgres.port}/", ":1/")
    with pytest.raises(SystemFailure, match=r"postgresql://raybooth:\*\*\*@127.0.0.1:1/") as told:
        Ledger(gone)
    assert "not-to-be-shown" not in str(told.value)
    with pytest.raises(SystemFailure, match="authentication failed") as told:
        Ledger(postgres.new().replace("not-to-be-shown", "wrong-one"))
    assert "wrong-one" not in str(told.value)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mysql://a:secret@b/c", "cannot be in mysql"),
        ("campaigns.db", "cannot be read"),
        ("sqlite://", "needs a file"),
        ("sqlite:////dev/null/campaigns.db", "cannot be made"),
        ("postgresql://a:secret@b:port/c", "cannot be read"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused(uri, said):
    with pytest.raises(UserError, match=said) as told:
        Ledger(uri)
    assert "secret" not in str(told.value)


def test_a_file_that_is_no_ledger_is_told(tmp_path):
    (tmp_path / "campaigns.db").write_bytes(b"not a database" * 100)

    with pytest.raises(SystemFailure, match="file is not a database"):
        Ledger(f"sqlite:///{tmp_path / 'campaigns.db'}")


def test_the_ledger_lies_in_the_storage_root_unless_it_is_said_otherwise(storage, monkeypatch, tmp_path):
    monkeypatch.delenv("RAYBOOTH_LEDGER", raising=False)
    assert ledger_uri(storage.uri, None) == f"sqlite:///{storage.uri}/campaigns.db"
    monkeypatch.setenv("RAYBOOTH_LEDGER", "postgresql://host/db")
    assert ledger_uri(storage.uri, None) == "postgresql://host/db"
    assert ledger_uri(storage.uri, "sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_remote_storage_root_keeps_its_ledger_in_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("RAYBOOTH_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)

    assert ledger_uri("s3://bucket/booth", None) == f"sqlite:///{tmp_path}/campaigns.db"


def test_ten_thousand_runs_are_enrolled_counted_and_recorded_quickly(tmp_path):
    recipe = {"train": {"steps": 100, "lr": 1e-4}, "subject": {"images": "x" * 800}}
    runs = [NewRun(f"subject-{i}", "dog", "acme", 0, 100, {**recipe, "seed": i}) for i in range(10_000)]
    seconds = {}

    def timed(what, act):
        gc.collect()
        gc.disable()  # what other tests have left in this process is not what is measured
        try:
            began = time.process_time()
            act()
            seconds[what] = min(time.process_time() - began, seconds.get(what, math.inf))
        finally:
            gc.enable()

    with Ledger(f"sqlite:///{tmp_path / 'campaigns.db'}") as ledger:
        timed("enroll", lambda: enroll(ledger, *runs))
        timed("enroll again", lambda: enroll(ledger, *runs))
        rows = ledger.runs("pets")
        changes = [
            Change(row.id, {"state": "training", "step": 1, "gang": "g", "attempts": 1})
            for row in rows[:1000]
        ]
        with ledger.claim("pets") as claim:
            timed("record", lambda: ledger.record(claim, changes))
        for _ in range(3):
            timed(
                "status",
                lambda: (ledger.campaign("pets"), ledger.counts("pets"), ledger.runs("pets", "training")),
            )

    assert seconds["enroll"] < 5
    assert seconds["enroll again"] < 2
    assert seconds["record"] < 1
    assert seconds["status"] < 0.1, seconds


def test_reading_the_ledger_imports_nothing_heavy():
    code = "import sys, orchestrator.ledger; print(*{m.partition('.')[0] for m in sys.modules})"
    said, _ = another_process(code, stdout=subprocess.PIPE).communicate(timeout=PATIENCE_S)

    assert not {"torch", "ray", "mlflow", "pyarrow", "alembic", "pydantic", "psycopg"} & set(said.split())
