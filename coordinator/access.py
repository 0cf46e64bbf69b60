"""Who may call what: one table, kept by one interceptor on each port.

A method that is not in the table is refused, whoever calls it.
"""

from __future__ import annotations

import contextvars
import inspect
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from coordinator.blobs import BlobRefusedError, BlobsUnavailableError
from coordinator.core.model import AgentId, Refusal, Standing, State
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
NOT_SERVED: frozenset[str] = frozenset({"/grpc.health.v1.Health/List"})
"""RPCs that a service has and the coordinator does not answer: refused, whoever calls."""

caller: contextvars.ContextVar[Principal] = contextvars.ContextVar("caller")
"""Who makes the current call; set for every call on the main port."""

Handler = Callable[[Any, Any], Any]
Guard = Callable[[grpc.aio.ServicerContext], None]


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


class MainAccess(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The main port: a certificate of ours, a rule for the method, a known agent, a bounded rate."""

    def __init__(
        self,
        *,
        state: Callable[[], State],
        revoked: RevokedOperators,
        rates: Buckets,
        refused: Callable[[str], None],
    ) -> None:
        self._state = state
        self._revoked = revoked
        self._rates = rates
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)

        def guard(context: grpc.aio.ServicerContext) -> None:
            caller.set(self._admit(method, context))

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
        if principal.not_after_unix_s <= time.time():
            raise CallRefusedError(
                Refusal.WRONG_ROLE, f"the certificate of {principal.id} has expired; enrol again"
            )
        if principal.role is Role.AGENT:
            check_agent(self._state(), AgentId(principal.id))
        elif principal in self._revoked:
            raise CallRefusedError(
                Refusal.BANNED,
                f"the identity {principal.role.value}/{principal.id} was revoked; ask for a new one",
            )
        if not self._rates.take(f"{principal.role.value}/{principal.id}"):
            raise CallRefusedError(
                Refusal.RATE_LIMITED, f"{principal.id} calls too often; wait a second and retry"
            )
        return principal


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

        def guard(context: grpc.aio.ServicerContext) -> None:
            if method not in ENROLL_RULES:
                raise CallRefusedError(
                    Refusal.WRONG_ROLE, f"{method} is served on the main port, with a certificate"
                )
            if not self._rates.take(_host(context.peer())):
                raise CallRefusedError(
                    Refusal.RATE_LIMITED, "too many enrolments from this address; wait and retry"
                )

        return None if handler is None else _guarded(handler, guard, self._refused)


def _host(peer: str) -> str:
    return re.sub(r":\d+$", "", peer)


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
                guard(context)
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
                guard(context)
                return await inner(decoded(request), context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await abort(context, error)

        guarded = call
    return wrap(
        guarded,
        request_deserializer=_lenient(handler.request_deserializer),
        response_serializer=handler.response_serializer,
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
