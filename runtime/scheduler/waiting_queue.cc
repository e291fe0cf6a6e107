#include "runtime/scheduler/waiting_queue.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace firesteel {

void WaitingQueue::Push(uint64_t id, int32_t priority, const std::string& client, double cost,
                        absl::Time now) {
  Client& c = clients_[client];
  if (c.requests == 0) {
    // New here: level with the least served of the others.
    double least = std::numeric_limits<double>::infinity();
    for (const auto& [name, other] : clients_) {
      if (other.requests > 0) least = std::min(least, other.served);
    }
    c.served = least == std::numeric_limits<double>::infinity() ? 0 : least;
  }
  ++c.requests;
  Line& line = c.by_priority[priority];
  if (line.requests.empty()) line.head_since = now;
  line.requests.push_back(id);
  known_[id] = {.client = client, .priority = priority, .cost = cost};
  ++num_waiting_;
}

void WaitingQueue::PushPreempted(uint64_t id) { preempted_.emplace(known_.at(id).admission, id); }

std::vector<WaitingQueue::Cursor> WaitingQueue::Cursors(absl::Time now,
                                                        std::vector<double>* served) const {
  std::vector<Cursor> cursors;
  for (const auto& [name, client] : clients_) {
    for (const auto& [priority, line] : client.by_priority) {
      cursors.push_back({.line = &line,
                         .priority = priority,
                         .client = served->size(),
                         .aged = now - line.head_since >= ageing_});
    }
    served->push_back(client.served);
  }
  return cursors;
}

std::vector<uint64_t> WaitingQueue::Next(size_t count, absl::Time now) const {
  std::vector<uint64_t> next;
  for (const auto& [order, id] : preempted_) {
    if (next.size() == count) return next;
    next.push_back(id);
  }
  std::vector<double> served;
  std::vector<Cursor> cursors = Cursors(now, &served);
  const auto rank = [&](const Cursor& cursor) {
    const bool aged = cursor.aged && cursor.taken == 0;
    return std::tuple(!aged, aged ? 0 : -int64_t{cursor.priority}, served[cursor.client],
                      cursor.line->requests[cursor.taken]);
  };
  while (next.size() < count) {
    Cursor* best = nullptr;
    for (Cursor& cursor : cursors) {
      if (cursor.taken == cursor.line->requests.size()) continue;
      if (best == nullptr || rank(cursor) < rank(*best)) best = &cursor;
    }
    if (best == nullptr) break;
    const uint64_t id = best->line->requests[best->taken++];
    served[best->client] += known_.at(id).cost;
    next.push_back(id);
  }
  return next;
}

void WaitingQueue::Admit(uint64_t id, absl::Time now) {
  Known& known = known_.at(id);
  if (known.admission != 0) {
    preempted_.erase(known.admission);
    return;
  }
  known.admission = ++num_admitted_;
  clients_.at(known.client).served += known.cost;
  Leave(id, known, now);
}

void WaitingQueue::Remove(uint64_t id, absl::Time now) {
  Leave(id, known_.at(id), now);
  Forget(id);
}

void WaitingQueue::End(uint64_t id, double unused) {
  const Known& known = known_.at(id);
  preempted_.erase(known.admission);
  clients_.at(known.client).served -= unused;
  Forget(id);
}

// Out of its line.
void WaitingQueue::Leave(uint64_t id, const Known& known, absl::Time now) {
  Client& client = clients_.at(known.client);
  const auto it = client.by_priority.find(known.priority);
  auto& requests = it->second.requests;
  const auto place = std::find(requests.begin(), requests.end(), id);
  if (place == requests.begin()) it->second.head_since = now;
  requests.erase(place);
  if (requests.empty()) client.by_priority.erase(it);
  --num_waiting_;
}

void WaitingQueue::Forget(uint64_t id) {
  const auto known = known_.find(id);
  const auto client = clients_.find(known->second.client);
  if (--client->second.requests == 0) clients_.erase(client);
  known_.erase(known);
}

}  // namespace firesteel
