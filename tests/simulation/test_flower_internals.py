"""Says which private name of Flower moved; the other tests would only fail somewhere behind it."""

import dataclasses
import inspect

import pytest
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

MOVED = "fedaudit/simulation/flower_internals.py must follow Flower: "


def test_every_internal_name_of_flower_is_where_flower_internals_looks_for_it():
    """One test on purpose: a new release of Flower breaks this one, with the name in its message."""

    def expect(condition, what):
        assert condition, MOVED + what

    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        pytest.fail(MOVED + str(error))
    for name in ("_run_id", "_task_id", "_node_id"):
        expect(hasattr(TaskIdentity, name), f"TaskIdentity.{name} is gone")

    try:
        from fedaudit.simulation import flower_internals as internals
    except ImportError as error:
        pytest.fail(MOVED + str(error))

    with internals.identity():
        internals.take_identity(5)
        message = Message(RecordDict(), 7, "train")
        expect(message.metadata.run_id == 5, "Message no longer reads its run from TaskIdentity")
        expect(message.metadata.src_node_id == 1, "the SuperLink's node id is no longer 1")
        internals.stamp(message, "3", 6)
        expect(message.metadata.message_id == "3", 'metadata.__dict__["_message_id"] is no longer the id')
        expect(message.metadata.run_id == 6, 'metadata.__dict__["_run_id"] is no longer the run')
        copied = internals.copy_message(message, RecordDict())
        expect(
            copied.metadata == message.metadata, "Message(metadata=) no longer takes the metadata as they are"
        )
        expect(copied.metadata is not message.metadata, "a copied message shares its metadata")
        reply = internals.error_reply(internals.ClientAppException("why"), message)
        expect(reply.metadata.reply_to_message_id == "3", "a reply no longer names its message")
        expect(reply.metadata.src_node_id == 7, "a reply no longer comes from the node it was sent to")

    expect(internals.empty_run(5).run_id == 5, "Run.create_empty no longer takes the run id")
    codes = internals.ErrorCode
    names = ("UNKNOWN", "LOAD_CLIENT_APP_EXCEPTION", "CLIENT_APP_RAISED_EXCEPTION")
    expect([getattr(codes, n, None) for n in names] == [0, 1, 2], f"ErrorCode changed: {names}")
    text = str(internals.ClientAppException("why"))
    expect(
        text == "\nException ClientAppException occurred. Message: why", "ClientAppException's text changed"
    )

    record = ArrayRecord()
    internals.replace_values(record, {"a": 1})
    expect(record["a"] == 1, 'a record\'s items are no longer in __dict__["_data"]')
    expect(record.copy() is not record, "TypedDict.copy is gone")
    expect("a" in record.copy(), "TypedDict.copy no longer copies")

    from flwr.supercore import telemetry

    expect(telemetry.FLWR_TELEMETRY_ENABLED in ("0", "1"), "telemetry.FLWR_TELEMETRY_ENABLED is gone")
    expect(hasattr(telemetry.EventType, "PYTHON_API_RUN_SIMULATION_LEAVE"), "telemetry.EventType changed")

    try:
        from flwr.simulation.run_simulation import _run_simulation
    except ImportError as error:
        pytest.fail(MOVED + str(error))
    needed = {"num_supernodes", "exit_event", "client_app", "server_app", "backend_name", "backend_config"}
    missing = needed - set(inspect.signature(_run_simulation).parameters)
    expect(not missing, f"_run_simulation lost {missing}")

    fields = {field.name for field in dataclasses.fields(Context)}
    expect(fields >= {"run_id", "node_id", "node_config", "state", "run_config"}, "Context lost a field")
    expect(callable(ClientApp()), "a ClientApp is no longer called with a message and a context")
    expect(Error(2, "x").code == 2, "Error changed")


def test_the_identity_of_the_process_is_restored():
    from fedaudit.simulation import flower_internals as internals

    before = internals.current_run()
    with internals.identity():
        internals.take_identity(123)
        assert internals.current_run() == 123
    assert internals.current_run() == before


def test_telemetry_is_off_inside_the_block_only():
    from flwr.supercore import telemetry

    from fedaudit.simulation import flower_internals as internals

    before = telemetry.FLWR_TELEMETRY_ENABLED
    with internals.no_telemetry():
        assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert before == telemetry.FLWR_TELEMETRY_ENABLED
