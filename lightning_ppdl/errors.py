"""Every error this package raises on purpose, one class a cause, so that callers can tell them apart.

Each message names the argument or the record at fault, its value, and what to do about it.
"""


class PPDLError(Exception):
    """Base of all errors raised by this package."""


class ConfigurationError(PPDLError, ValueError):
    """An argument or a setting has a value that cannot work."""


class NonFiniteUpdateError(PPDLError):
    """The local update holds NaN or infinity: local training diverged, so nothing was uploaded."""


class SelectionError(PPDLError):
    """A selection returned what is no set of indices, or more than its fraction."""


class MergeError(PPDLError):
    """A merge rule returned what cannot be added to the shared parameters; nothing was changed."""


class BudgetExhaustedError(PPDLError):
    """The privacy budget allows no further release."""


class TaintedStateError(PPDLError):
    """Parameters or optimizer state were trained on without noise; releasing what follows would void the
    guarantee."""


class FingerprintMismatchError(PPDLError):
    """A participant shares other parameters than the collaboration it wants to join."""


class ServerClosedError(PPDLError):
    """The parameter server was closed; nothing more can be exchanged with it."""


class ServerUnavailableError(PPDLError):
    """The exchange did not reach the parameter server; it may be tried again."""


class ServerFailedError(PPDLError):
    """The server failed at a request; its operator finds the reason in its log."""


class UploadLostError(ServerUnavailableError):
    """An upload is known never to have arrived, and is not to be sent again."""


class TurnTimeoutError(PPDLError):
    """The turn did not come within the time the participant was willing to wait."""


class RankZeroFailedError(PPDLError):
    """On the other ranks of a participant of several devices: rank zero's exchange with the server failed,
    and rank zero says why."""


class ParticipantFailedError(PPDLError):
    """A simulated participant raised; the error that it raised is the ``__cause__``."""


class AdmissionError(PPDLError):
    """Base of the server's refusals. A refused request leaves the server's state untouched."""


class AuthenticationError(AdmissionError):
    """No certificate or token that the server knows, or one that belongs to another participant."""


class LimitExceededError(AdmissionError):
    """More than the server lets one participant, or all of them, have: members, uploads a minute, bytes."""


class UnknownParticipantError(AdmissionError):
    """The participant has not joined, or is not among the members the server was given."""


class SessionEndedError(UnknownParticipantError):
    """The session is over: its participant left, or joined anew elsewhere, or the server is another one."""


class JoinRefusedError(AdmissionError):
    """What the participant declares at join is beyond what the server agrees to."""


class MalformedUpdateError(AdmissionError):
    """Indices and values do not pair up, or have the wrong type."""


class IndexOutOfRangeError(AdmissionError):
    """An index lies outside the shared parameter vector."""


class UnsortedIndicesError(AdmissionError):
    """Indices are not strictly increasing: out of order, or one of them twice."""


class NonFiniteValueError(AdmissionError):
    """An uploaded value is NaN or infinite."""


class BoundExceededError(AdmissionError):
    """An uploaded value is larger in magnitude than the agreed bound (gamma)."""


class FractionExceededError(AdmissionError):
    """More entries were uploaded than the agreed upload fraction (theta_u) allows."""


class RoundSeenBeforeError(AdmissionError):
    """An update for this round was already accepted, with other content."""


class UnknownVersionError(AdmissionError):
    """An update claims to be based on a version the server never served."""


class TurnNotHeldError(AdmissionError):
    """The participant acted outside its turn: it never took it, or its lease ran out."""


class LateUpdateError(TurnNotHeldError):
    """Under the synchronous protocol: the cycle for which the participant trained was closed without it."""


class StateError(PPDLError):
    """The server's state directory cannot be used: damaged, of another collaboration or a later version."""


class StateLockedError(StateError):
    """Another server holds the state directory."""


class StateWriteError(StateError, ServerUnavailableError):
    """What was to be made durable could not be written; nothing was changed, and it may be tried again."""


class LedgerError(PPDLError):
    """The privacy ledger cannot be used: damaged, no ledger, closed, or of a later version."""


class LedgerLockedError(LedgerError):
    """Another run holds the privacy ledger."""


class LedgerWriteError(LedgerError):
    """A release could not be entered into the privacy ledger, so it may not be sent."""


class LedgerBehindError(LedgerError):
    """The server has accepted releases that the privacy ledger does not know."""
