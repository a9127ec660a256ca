// A runner for steps of type Score in Go, without packages. It answers what sequencerd asks:
//
//	SECRET=whsec_... PORT=8000 go run score.go
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type call struct {
	Config struct {
		PerVisit *int `json:"perVisit"`
	} `json:"config"`
	Runners []struct {
		ID             json.RawMessage `json:"id"`
		IdempotencyKey string          `json:"idempotencyKey"`
		Data           struct {
			Visits []any `json:"visits"`
		} `json:"data"`
	} `json:"runners"`
}

type answer struct {
	ID     json.RawMessage `json:"id"`
	Action string          `json:"action"`
	Data   map[string]int  `json:"data"`
}

// In a real service a table: what was done under an idempotency key.
var done sync.Map

// Standard Webhooks: https://github.com/standard-webhooks/standard-webhooks
func isSigned(key []byte, header http.Header, body []byte) bool {
	id, at := header.Get("webhook-id"), header.Get("webhook-timestamp")
	seconds, err := strconv.ParseInt(at, 10, 64)
	if age := time.Since(time.Unix(seconds, 0)).Abs(); err != nil || age > 5*time.Minute {
		return false
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, at, body)
	for _, signature := range strings.Fields(header.Get("webhook-signature")) {
		given, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(signature, "v1,"))
		if err == nil && hmac.Equal(given, mac.Sum(nil)) {
			return true
		}
	}
	return false
}

func main() {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(os.Getenv("SECRET"), "whsec_"))
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/", func(response http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(request.Body)
		if err != nil || !isSigned(key, request.Header, body) {
			response.WriteHeader(http.StatusUnauthorized)
			return
		}
		var asked call
		if err := json.Unmarshal(body, &asked); err != nil {
			response.WriteHeader(http.StatusBadRequest)
			return
		}
		answers := []answer{}
		for _, one := range asked.Runners {
			perVisit := 10
			if asked.Config.PerVisit != nil {
				perVisit = *asked.Config.PerVisit
			}
			points := perVisit * len(one.Data.Visits)
			action := "altNext"
			if points > 50 {
				action = "next"
			}
			made, _ := done.LoadOrStore(
				one.IdempotencyKey, answer{one.ID, action, map[string]int{"score": points}})
			answers = append(answers, made.(answer))
		}
		response.Header().Set("Content-Type", "application/json")
		json.NewEncoder(response).Encode(answers)
	})
	port := os.Getenv("PORT")
	if port == "" {
		port = "8000"
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+port, nil))
}
