// The bytes of a packed file, as docs/formats.md has them: for its reader, its writer and their
// tests.

#ifndef FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FORMAT_H_
#define FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FORMAT_H_

#include <bit>
#include <cstddef>
#include <cstdint>

struct XXH3_state_s;  // of xxhash.h, which only packed_format.cc includes

namespace firesteel::packed {

static_assert(std::endian::native == std::endian::little, "files are little-endian, as they are");

// The first byte is not ASCII and the rest has both kinds of line end: a copy in text mode shows.
inline constexpr char kMagic[8] = {'\x89', 'F', 'S', 'T', '\r', '\n', '\x1A', '\n'};

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t entries;  // rows of the table
  uint64_t file_bytes;
  uint64_t table_offset;  // right behind the header
  uint64_t table_bytes;
  uint64_t table_checksum;
  uint64_t reserved;         // 0
  uint64_t header_checksum;  // of all bytes before it
};
static_assert(sizeof(FileHeader) == 64);

struct FileSpan {
  uint64_t offset;
  uint64_t bytes;
  uint64_t checksum;
};

struct TableEntry {
  char name[48];      // ends with NUL, filled with NUL
  uint32_t type;      // PackedPart::Type
  uint32_t reserved;  // 0
  uint64_t rows;
  uint64_t cols;
  uint64_t stride;
  FileSpan data;
  FileSpan scales;
};
static_assert(sizeof(TableEntry) == 128);

/// 1,024 layers of nine parts, the rest of the model, the texts; and room.
inline constexpr uint32_t kMaxEntries = 16384;

inline constexpr size_t kAlignment = 64;          // of everything
inline constexpr size_t kMatrixAlignment = 4096;  // of matrices: a page

inline constexpr char kConfigName[] = "config.json";
inline constexpr char kDefaultsName[] = "generation_config.json";
inline constexpr char kTokenizerName[] = "tokenizer.model";

inline constexpr uint64_t kMaxJsonBytes = uint64_t{1} << 20;
inline constexpr uint64_t kMaxTokenizerBytes = uint64_t{256} << 20;

/// XXH3-64, seed 0, of bytes that come piece by piece.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;
  void Add(const void* data, size_t bytes);
  uint64_t Value() const;

 private:
  XXH3_state_s* const state_;
};

/// The same of one piece.
uint64_t ChecksumOf(const void* data, size_t bytes);

/// The least multiple of `alignment` from `offset` on.
constexpr uint64_t AlignUp(uint64_t offset, uint64_t alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

}  // namespace firesteel::packed

#endif  // FIRESTEEL_RUNTIME_CHECKPOINT_PACKED_FORMAT_H_
