// Who is next: the requests that wait, in the order in which the batch takes them.

#ifndef FIRESTEEL_RUNTIME_SCHEDULER_WAITING_QUEUE_H_
#define FIRESTEEL_RUNTIME_SCHEDULER_WAITING_QUEUE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/time/time.h"

namespace firesteel {

/// The order: what was preempted first; then by priority; among equals the client that was served
/// least, as the virtual token counter says (Sheng et al., "Fairness in Serving Large Language
/// Models", OSDI 2024); then by arrival. A client is charged a request's worst case when it is
/// admitted and credited what was not used when it ends; one that comes back after having had
/// nothing here starts level with the least served of the others, so that idling saves up nothing.
///
/// Nobody starves: each client's requests of one priority form a line, and whoever has been at the
/// head of its line for `ageing` goes before every priority.
///
/// Not thread-safe. Time is an argument.
class WaitingQueue {
 public:
  /// `ageing` > 0.
  explicit WaitingQueue(absl::Duration ageing) : ageing_(ageing) {}

  /// A request arrives; ids rise. `cost`: tokens in the worst case.
  void Push(uint64_t id, int32_t priority, const std::string& client, double cost, absl::Time now);
  /// A request that was admitted before waits again, ahead of all that weren't: the first of them
  /// that was admitted goes first.
  void PushPreempted(uint64_t id);

  /// At most `count` requests in the order of admission.
  std::vector<uint64_t> Next(size_t count, absl::Time now) const;

  /// The first of Next() joins the batch; its client is charged.
  void Admit(uint64_t id, absl::Time now);
  /// A request that waits for the first time goes without having been admitted.
  void Remove(uint64_t id, absl::Time now);
  /// An admitted request ends, from the batch or after a preemption, with `unused` tokens of its
  /// cost.
  void End(uint64_t id, double unused);

  bool empty() const { return size() == 0; }
  size_t size() const { return num_waiting_ + preempted_.size(); }
  /// Clients with something here: what the memory grows with.
  size_t num_clients() const { return clients_.size(); }

 private:
  struct Line {
    std::deque<uint64_t> requests;
    absl::Time head_since;  // when the first of them became the first
  };
  struct Client {
    double served = 0;
    size_t requests = 0;                  // waiting or running
    std::map<int32_t, Line> by_priority;  // lines that are not empty
  };
  struct Known {
    std::string client;
    int32_t priority = 0;
    double cost = 0;
    uint64_t admission = 0;  // the how-manieth it was; 0: not yet
  };
  // A line as Next() goes through it.
  struct Cursor {
    const Line* line;
    int32_t priority;
    size_t client;  // index of what it was served
    bool aged;
    size_t taken = 0;
  };
  std::vector<Cursor> Cursors(absl::Time now, std::vector<double>* served) const;
  void Leave(uint64_t id, const Known& known, absl::Time now);
  void Forget(uint64_t id);

  const absl::Duration ageing_;
  std::unordered_map<std::string, Client> clients_;
  std::unordered_map<uint64_t, Known> known_;  // waiting or admitted, until they end
  std::map<uint64_t, uint64_t> preempted_;     // ids by the order of admission
  size_t num_waiting_ = 0;                     // in lines
  uint64_t num_admitted_ = 0;
};

}  // namespace firesteel

#endif  // FIRESTEEL_RUNTIME_SCHEDULER_WAITING_QUEUE_H_
