// Byte-pair encoding: the tokens of a piece of text, from a vocabulary in tables that are made in milliseconds.
//
// The algorithm is that of the `tokenizers` library's BPE model, with which tests compare it: a piece begins as its
// characters, and of all neighbours that can be merged those with the lowest rank, leftmost first, are merged until
// none are left.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace inflight {

constexpr uint32_t kNone = UINT32_MAX;

// Polynomial hash of bytes, modulo 2^64. That of two texts together follows from their own.
struct Hash {
    uint64_t sum = 0;
    uint64_t power = 1;  // base to the number of bytes

    void add(unsigned char byte);
    Hash then(const Hash& next) const { return {sum * next.power + next.sum, power * next.power}; }
};

// Texts one after the other.
class Texts {
  public:
    void add(std::string_view text);  // throws std::length_error beyond 4 GB
    size_t size() const { return begins_.size() - 1; }
    std::string_view at(size_t index) const {
        return std::string_view(bytes_).substr(begins_[index], begins_[index + 1] - begins_[index]);
    }
    size_t bytes() const { return bytes_.size(); }
    void reserve(size_t count) { begins_.reserve(count + 1); }

  private:
    std::string bytes_;
    std::vector<uint32_t> begins_{0};
};

bool is_utf8(std::string_view text);

// The texts of tokens by their ids, and ids by texts.
class Tokens {
  public:
    // Throws std::invalid_argument: two texts are equal (the message has the text), or the texts are made to collide.
    explicit Tokens(Texts texts);

    uint32_t size() const { return static_cast<uint32_t>(hashes_.size()); }
    const Texts& texts() const { return texts_; }
    std::string_view text(uint32_t id) const { return texts_.at(id); }
    uint32_t find(std::string_view text) const;          // kNone: no token
    uint32_t join(uint32_t left, uint32_t right) const;  // the token whose text is both texts

  private:
    Texts texts_;
    std::vector<Hash> hashes_;
    std::vector<uint32_t> slots_;  // open addressing; a power of two, at most half full
};

struct Merge {
    uint64_t rank;
    uint32_t made;  // kNone: the two are not merged
};

// Which two tokens become which, by the pair of their ids.
class Pairs {
  public:
    explicit Pairs(size_t count);
    void set(uint32_t left, uint32_t right, Merge merge);  // the last one of a pair counts
    Merge find(uint32_t left, uint32_t right) const;

  private:
    struct Entry {
        uint64_t key;
        uint32_t rank, made;
    };
    size_t slot(uint64_t key) const;
    std::vector<Entry> entries_;
};

struct Kind {
    uint32_t unknown = kNone;   // the token for a run of characters that have none; kNone: they are left out
    bool bytes = false;         // a character without a token becomes the tokens of its bytes, <0x00> to <0xFF>
    bool whole_pieces = false;  // a piece that is a token is not merged
};

// Merges that were looked up lately: for one call, on one thread.
class Memo {
  public:
    Memo() : entries_(kEntries) {}

  private:
    friend class Bpe;
    static constexpr size_t kEntries = 2048;
    struct Entry {
        uint32_t left = kNone, right = kNone;
        Merge merge{0, kNone};
    };
    std::vector<Entry> entries_;
};

class Bpe {
  public:
    // Merges are those of the list, best first. Throws std::invalid_argument: one is no pair, or has no token.
    Bpe(const Tokens& tokens, Kind kind, const Texts& merges);
    // Any two tokens whose texts together are a token are merged, those with the lowest order of the result first, of
    // two ways to one result the one with the shorter left token. Order kNone: never the result of a merge.
    Bpe(const Tokens& tokens, Kind kind, std::vector<uint32_t> order);

    // Appends the tokens of a piece, valid UTF-8.
    void encode(std::string_view piece, Memo& memo, std::vector<uint32_t>& ids) const;

  private:
    Bpe(const Tokens& tokens, Kind kind);
    Merge merge(uint32_t left, uint32_t right) const;
    Merge merge(uint32_t left, uint32_t right, Memo& memo) const;
    std::vector<uint32_t> characters(std::string_view piece) const;

    const Tokens& tokens_;
    Kind kind_;
    std::vector<uint32_t> order_;
    Pairs pairs_;
    bool by_score_ = false;
    std::array<uint32_t, 256> bytes_;
};

// Tokens that are found in a text before anything else is done to it: the first one, of several there the longest.
class Added {
  public:
    Added(const Tokens& tokens, const std::vector<uint32_t>& ids);
    // The parts of a text: an added token's id, or kNone and text between them, never empty.
    std::vector<std::pair<uint32_t, std::string_view>> split(std::string_view text) const;

  private:
    struct Slot {
        uint64_t sum = 0;  // of the hash
        uint32_t id = kNone;
    };
    const Tokens& tokens_;
    std::vector<Slot> slots_;
    std::array<std::vector<uint32_t>, 256> lengths_;  // in bytes, ascending, by the first byte
};

}  // namespace inflight
