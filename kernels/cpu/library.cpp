// The C interface: abi.h.
#include <exception>
#include <new>

#include "engine.h"
#include "matrix.h"
#include "processor.h"

namespace {

// However a call ends.
struct Rest {
  const IsaTable* isa;
  ~Rest() { isa->rest(); }
};

}  // namespace

extern "C" {

const char* pagehold_isas(void) { return isa_names(); }

PhEngine* pagehold_create(const PhModel* model, uint32_t threads, const char* isa, const char** error) {
  *error = nullptr;
  if (model->abi_version != PAGEHOLD_ABI_VERSION || model->model_size != sizeof(PhModel) ||
      model->chunk_size != sizeof(PhChunk) || model->sampling_size != sizeof(PhSampling)) {
    *error = "the native library is of another version than the Python package: run `pip install .` again";
    return nullptr;
  }
  const IsaTable* table = choose_isa(isa, model->bfloat16_inputs != 0);
  if (table == nullptr) {
    *error = "this processor lacks the instruction set that was asked for, or there is none of that name";
    return nullptr;
  }
  try {
    return new PhEngine(model, threads == 0 ? 1 : threads, table);
  } catch (const std::exception&) {
    *error = "out of memory or threads";
    return nullptr;
  }
}

void pagehold_destroy(PhEngine* engine) { delete engine; }

void pagehold_map_pool(PhEngine* engine, const PhPool* pool) { engine->pool = *pool; }

const char* pagehold_isa(const PhEngine* engine) { return engine->isa->name; }

int pagehold_step(PhEngine* engine, const PhChunk* chunks, uint32_t count, uint32_t* tokens, float* logprobs,
                  uint32_t* accepted, float* draft_logprobs, float* all_logits) {
  const Rest rest{engine->isa};
  try {
    return engine->watched_step(chunks, count, {tokens, logprobs, accepted, draft_logprobs}, all_logits);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int pagehold_attend(PhEngine* engine, uint32_t layer, const PhChunk* chunks, uint32_t count, const float* qkv,
                    float* output) {
  const Rest rest{engine->isa};
  try {
    engine->attend(layer, chunks, count, qkv, output);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int pagehold_sample(PhEngine* engine, float* logits, const PhSampling* sampling, const uint32_t* tokens, uint32_t known,
                    uint32_t* token, float* logprob) {
  try {
    const Sampled result = sample(*engine->isa, logits, engine->model.vocab, *sampling, tokens, known);
    *token = result.token;
    *logprob = result.logprob;
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
