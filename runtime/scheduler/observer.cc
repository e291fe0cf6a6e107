#include "runtime/scheduler/observer.h"

namespace firesteel {

const char* RejectionReasonName(RejectionReason reason) {
  switch (reason) {
    case RejectionReason::kQueueFull:
      return "queue_full";
    case RejectionReason::kQueueTokens:
      return "queue_tokens";
    case RejectionReason::kQueueWait:
      return "queue_wait";
    case RejectionReason::kKvCache:
      return "kv_cache";
    case RejectionReason::kDraining:
      return "draining";
    case RejectionReason::kDeadline:
      return "deadline";
  }
  return "unknown";
}

const char* StepPhaseName(StepPhase phase) {
  switch (phase) {
    case StepPhase::kPrefill:
      return "prefill";
    case StepPhase::kDecode:
      return "decode";
    case StepPhase::kMixed:
      return "mixed";
  }
  return "unknown";
}

}  // namespace firesteel
