#include "runtime/scheduler/transformer_runner.h"

namespace firesteel {

TransformerRunner::TransformerRunner(const std::shared_ptr<const ModelWeights>& weights,
                                     ComputeType compute, const EngineOptions& options,
                                     uint32_t max_logit_rows, WorkerPool* pool)
    : pool_(pool),
      transformer_(weights, compute, options.kv_dtype, pool, options.max_batch_tokens,
                   max_logit_rows,
                   *options.sublinear_head ? std::optional(SublinearHeadOptions()) : std::nullopt),
      cost_(*weights, options.kv_dtype, transformer_.sublinear_head_bytes()),
      samplers_(pool->num_threads()) {}

// Draws and scores are dealt to the workers; each depends on its own sequence only.
void TransformerRunner::ReadLogits(std::span<Draw> draws, std::span<Score> scores) {
  if (draws.empty() && scores.empty()) return;
  pool_->Run([&](Worker& worker) {
    const size_t total = draws.size() + scores.size();
    for (size_t i = worker.index(); i < total; i += worker.team_size()) {
      if (i < draws.size()) {
        DrawToken(samplers_[worker.index()], draws[i]);
        continue;
      }
      Score& score = scores[i - draws.size()];
      score.logprob = LogprobOf(transformer_.logits(score.logit_row), score.token,
                                score.request->request().logprobs.value_or(0));
    }
  });
}

void TransformerRunner::DrawToken(Sampler& sampler, Draw& draw) {
  const GenerationRequest& request = draw.request->request();
  const Sequence& sequence = *draw.sequence;
  const uint64_t position = sequence.next_position();
  const auto forbidden = sequence.forbidden_tokens();
  if (const LogitCandidates some = transformer_.candidates(draw.logit_row); !some.ids.empty()) {
    draw.token = sampler.Sample(some.ids, some.logits, request.sampling, sequence.index(), position,
                                forbidden);
    return;
  }
  const std::span<const float> logits = transformer_.logits(draw.logit_row);
  draw.token = sampler.Sample(logits, request.sampling, sequence.index(), position, forbidden,
                              sequence.seen());
  if (draw.token.ok() && request.logprobs.has_value()) {
    draw.logprob = LogprobOf(logits, *draw.token, *request.logprobs);
  }
}

}  // namespace firesteel
