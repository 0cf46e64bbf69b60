"""Who may call what: one table, kept by one interceptor on each port.

A method that is not in the table is refused, whoever calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from coordinator.blobs import BlobRefusedError, BlobsUnavailableError
from coordinator.core.model import (
    AgentId,
    Event,
    Record,
    Refusal,
    Reply,
    Standing,
    StandingChanged,
    State,
)
from coordinator.identity import BadRequestError, Principal, RevokedOperators, Role, principal_of
from coordinator.loop import LoopStoppedError
from coordinator.names import UnknownNameError
from coordinator.rates import Buckets
from coordinator.schema import SettingError
from coordinator.translate import MalformedError
from protos.wire import refusal_status

log = structlog.get_logger("coordinator.access")

_AGENT = frozenset({Role.AGENT})
_ADMIN = frozenset({Role.ADMIN})
_ONLOOKER = frozenset({Role.ADMIN, Role.OBSERVER})
_ANYONE_KNOWN = frozenset(Role)

MAIN_RULES: dict[str, frozenset[Role]] = {
    "/muster.v1.AgentService/RenewIdentity": _AGENT,
    "/muster.v1.AgentService/Session": _AGENT,
    "/muster.v1.AgentService/FindBlobs": _AGENT,
    "/muster.v1.AgentService/GetBlob": _AGENT,
    "/muster.v1.AgentService/PutBlob": _AGENT,
    "/muster.v1.AgentService/PresignPut": _AGENT,
    "/muster.v1.AgentService/PresignGet": _AGENT,
    "/muster.v1.AgentService/FindSources": _AGENT,
    "/muster.v1.AgentService/ReportShard": _AGENT,
    "/muster.v1.AdminService/SubmitJob": _ADMIN,
    "/muster.v1.AdminService/CommandJob": _ADMIN,
    "/muster.v1.AdminService/ScaleJob": _ADMIN,
    "/muster.v1.AdminService/RollBackJob": _ADMIN,
    "/muster.v1.AdminService/ListJobs": _ONLOOKER,
    "/muster.v1.AdminService/GetJob": _ONLOOKER,
    "/muster.v1.AdminService/ListAgents": _ONLOOKER,
    "/muster.v1.AdminService/GetAgent": _ONLOOKER,
    "/muster.v1.AdminService/CommandAgent": _ADMIN,
    "/muster.v1.AdminService/CreateToken": _ADMIN,
    "/muster.v1.AdminService/ListTokens": _ADMIN,
    "/muster.v1.AdminService/RevokeToken": _ADMIN,
    "/muster.v1.AdminService/ListCheckpoints": _ONLOOKER,
    "/muster.v1.AdminService/GetCheckpoint": _ONLOOKER,
    "/muster.v1.AdminService/VerifyCheckpoint": _ADMIN,
    "/muster.v1.AdminService/CommandCheckpoint": _ADMIN,
    "/muster.v1.AdminService/CollectGarbage": _ADMIN,
    "/muster.v1.AdminService/Watch": _ONLOOKER,
    "/muster.v1.AdminService/Logs": _ONLOOKER,
    "/muster.v1.AdminService/Steps": _ONLOOKER,
    "/muster.v1.AdminService/FindBlobs": _ADMIN,
    "/muster.v1.AdminService/GetBlob": _ADMIN,
    "/muster.v1.AdminService/PutBlob": _ADMIN,
    "/grpc.health.v1.Health/Check": _ANYONE_KNOWN,
    "/grpc.health.v1.Health/Watch": _ANYONE_KNOWN,
}
ENROLL_RULES: frozenset[str] = frozenset({"/muster.v1.AgentService/Enroll"})
"""The only method for callers without a certificate, on the enrolment port only."""
NOT_SERVED: frozenset[str] = frozenset(
    {
        "/grpc.health.v1.Health/List",
        "/muster.v1.PeerService/GetBlob",  # agents serve it to each other
    }
)
"""RPCs that the coordinator does not answer: refused, whoever calls."""

caller: contextvars.ContextVar[Principal] = contextvars.ContextVar("caller")
"""Who makes the current call; set for every call on the main port."""

Handler = Callable[[Any, Any], Any]
Guard = Callable[[grpc.aio.ServicerContext], contextlib.AbstractContextManager[None]]
"""Lets a caller in for the length of the `with`, or raises CallRefusedError."""


class CallRefusedError(Exception):
    """A call is refused: a normal answer with a reason."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


def calling_agent() -> AgentId:
    """The agent that makes the current call."""
    principal = caller.get()
    assert principal.role is Role.AGENT
    return AgentId(principal.id)


def check_agent(state: State, agent_id: AgentId) -> None:
    """Raise CallRefusedError unless the coordinator knows the agent and has not banned it."""
    agent = state.agents.get(agent_id)
    if agent is None:
        raise CallRefusedError(
            Refusal.UNKNOWN_AGENT,
            f"agent {agent_id} is not known to this coordinator; enrol it again with a new token",
        )
    if agent.standing is Standing.BANNED:
        detail = f" ({agent.standing_detail})" if agent.standing_detail else ""
        raise CallRefusedError(Refusal.BANNED, f"agent {agent_id} was banned by the operator{detail}")


CUT_OFF_S = 0.4
"""How often operators' open calls are looked at, and how long a banned agent's session has to take its GoAway."""


class MainAccess(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The main port: a certificate of ours, a rule for the method, a known agent, a bounded rate, and not
    too many calls at once.  Calls that are under way end when their caller is banned or revoked."""

    def __init__(
        self,
        *,
        state: Callable[[], State],
        revoked: RevokedOperators,
        rates: Buckets,
        most_calls: int,
        refused: Callable[[str], None],
    ) -> None:
        self._state = state
        self._revoked = revoked
        self._rates = rates
        self._most_calls = most_calls
        self._refused = refused
        self._calls: dict[str, dict[asyncio.Task[Any], Principal]] = {}
        # Those keys of _calls that are no agent's: few, and looked at often.
        self._operators: set[str] = set()
        self._cut: dict[asyncio.Task[Any], CallRefusedError] = {}
        self._watching: asyncio.Task[None] | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)

        @contextlib.contextmanager
        def guard(context: grpc.aio.ServicerContext) -> Iterator[None]:
            principal = self._admit(method, context)
            caller.set(principal)
            with self._under_way(principal):
                yield

        return None if handler is None else _guarded(handler, guard, self._refused)

    def _admit(self, method: str, context: grpc.aio.ServicerContext) -> Principal:
        found = context.auth_context().get("x509_pem_cert", ())
        principal = principal_of(bytes(found[0])) if found else None
        if principal is None:
            raise CallRefusedError(
                Refusal.WRONG_ROLE,
                "the client certificate carries no Muster identity; enrol, or use an identity file",
            )
        roles = MAIN_RULES.get(method)
        if roles is None:
            raise CallRefusedError(Refusal.WRONG_ROLE, f"{method} has no rule that says who may call it")
        if principal.role not in roles:
            allowed = " or ".join(sorted(role.value for role in roles))
            raise CallRefusedError(
                Refusal.WRONG_ROLE,
                f"{method} is for {allowed}; this identity is {principal.role.value} {principal.id}",
            )
        self._check(principal)
        if not self._rates.take(_key(principal)):
            raise CallRefusedError(
                Refusal.RATE_LIMITED, f"{principal.id} calls too often; wait a second and retry"
            )
        return principal

    def _check(self, principal: Principal) -> None:
        """Raise CallRefusedError unless this identity is good now."""
        if principal.not_after_unix_s <= time.time():
            raise CallRefusedError(
                Refusal.WRONG_ROLE, f"the certificate of {principal.id} has expired; enrol again"
            )
        if principal.role is Role.AGENT:
            check_agent(self._state(), AgentId(principal.id))
        elif principal in self._revoked:
            raise CallRefusedError(
                Refusal.BANNED, f"the identity {_key(principal)} was revoked; ask for a new one"
            )

    # ----------------------------------------------------------------------------- calls under way

    @contextlib.contextmanager
    def _under_way(self, principal: Principal) -> Iterator[None]:
        key = _key(principal)
        calls = self._calls.setdefault(key, {})
        if len(calls) >= self._most_calls:
            raise CallRefusedError(
                Refusal.RATE_LIMITED,
                f"{principal.id} has {self._most_calls} calls under way already; wait for one to end",
            )
        task = asyncio.current_task()
        assert task is not None
        calls[task] = principal
        if principal.role is not Role.AGENT:
            self._operators.add(key)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            raise self._cut[task] from None
        finally:
            self._cut.pop(task, None)
            calls.pop(task, None)
            if not calls:
                self._calls.pop(key, None)
                self._operators.discard(key)

    def _end(self, key: str, why: CallRefusedError) -> None:
        for task in tuple(self._calls.get(key, ())):
            self._cut[task] = why
            task.cancel()

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch_operators(), name="watching operators")

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch_operators(self) -> None:
        """Operators are few, and revoked in a file that another process writes."""
        while True:
            await asyncio.sleep(CUT_OFF_S)
            for key in tuple(self._operators):
                for principal in set(self._calls[key].values()):
                    try:
                        self._check(principal)
                    except CallRefusedError as why:
                        self._end(key, why)

    # As an observer of the loop: a banned agent is told by a GoAway, and cut off if it does not take it.

    def committed(self, record: Record) -> None:
        if isinstance(record, StandingChanged) and record.standing is Standing.BANNED:
            why = CallRefusedError(Refusal.BANNED, f"agent {record.agent_id} was banned by the operator")
            key = f"{Role.AGENT.value}/{record.agent_id}"
            asyncio.get_running_loop().call_later(CUT_OFF_S, self._end, key, why)

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None: ...

    def wrote(self, entries: int, seconds: float) -> None: ...


def _key(principal: Principal) -> str:
    return f"{principal.role.value}/{principal.id}"


GUESS_COSTS = 10
"""An enrolment with a wrong token counts as so many."""


class EnrollAccess(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The enrolment port: Enroll and nothing else, at a bounded rate for each address."""

    def __init__(self, *, rates: Buckets, refused: Callable[[str], None]) -> None:
        self._rates = rates
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)

        @contextlib.contextmanager
        def guard(context: grpc.aio.ServicerContext) -> Iterator[None]:
            if method not in ENROLL_RULES:
                raise CallRefusedError(
                    Refusal.WRONG_ROLE, f"{method} is served on the main port, with a certificate"
                )
            if not self._rates.take(host_of(context.peer())):
                raise CallRefusedError(
                    Refusal.RATE_LIMITED, "too many enrolments from this address; wait and retry"
                )
            yield

        return None if handler is None else _guarded(handler, guard, self._refused)


def host_of(peer: str) -> str:
    """The address of a gRPC peer; of IPv6 the /64, which is what one subscriber has to choose from."""
    host = re.sub(r":\d+$", "", unquote(peer))
    found = re.fullmatch(r"ipv6:\[([0-9a-f:]+)(%\w+)?\]", host)
    if found is None:
        return host
    return str(ipaddress.ip_network((found[1], 64), strict=False))


def _guarded(
    handler: grpc.RpcMethodHandler, guard: Guard, refused: Callable[[str], None]
) -> grpc.RpcMethodHandler:
    """The same method, with `guard` before it and our exceptions turned into statuses."""
    if handler.request_streaming and handler.response_streaming:
        inner, wrap = handler.stream_stream, grpc.stream_stream_rpc_method_handler
    elif handler.request_streaming:
        inner, wrap = handler.stream_unary, grpc.stream_unary_rpc_method_handler
    elif handler.response_streaming:
        inner, wrap = handler.unary_stream, grpc.unary_stream_rpc_method_handler
    else:
        inner, wrap = handler.unary_unary, grpc.unary_unary_rpc_method_handler

    async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        refusal = _refusal(error)
        if refusal is not None:
            refused(refusal.name)
            if refusal is Refusal.NO_SPACE:  # nobody but our operator can do something about it
                log.warning("no space", error=str(error))
            await context.abort_with_status(refusal_status(int(refusal), str(error)))
        elif isinstance(error, LoopStoppedError | BlobsUnavailableError):
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        else:
            log.error("call failed", error=str(error), exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, "the coordinator failed; its log says why")
        raise AssertionError("abort returned")

    def decoded(request: Any) -> Any:
        return _Messages(request) if handler.request_streaming else _message(request)

    if inspect.isasyncgenfunction(inner):

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with guard(context):
                    async for reply in inner(decoded(request), context):
                        yield reply
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, error)

        guarded: Handler = stream
    else:

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                with guard(context):
                    return await inner(decoded(request), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, error)

        guarded = call

    def serialize(reply: Any) -> bytes:
        # A plan goes to thousands in the same words and is encoded once.
        encoded: bytes = reply if isinstance(reply, bytes) else handler.response_serializer(reply)
        return encoded

    return wrap(
        guarded,
        request_deserializer=_lenient(handler.request_deserializer),
        response_serializer=serialize,
    )


_UNREADABLE = object()
"""In place of a message that is none: gRPC itself would log a traceback for it, before anyone asked who calls."""


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _UNREADABLE

    return read


def _message(request: Any) -> Any:
    if request is _UNREADABLE:
        raise MalformedError("message: its bytes are not a message of this call")
    return request


class _Messages:
    """The caller's messages, the first that is none raising MalformedError."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        return _message(await anext(self._requests))


def _refusal(error: Exception) -> Refusal | None:
    match error:
        case CallRefusedError() | BlobRefusedError() | UnknownNameError():
            return error.refusal
        case BadRequestError():
            return Refusal.BAD_CSR
        case MalformedError() | SettingError():
            return Refusal.INVALID
        case _:
            return None
